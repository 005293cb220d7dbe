"""What one step and one checkpoint of a run ask of each rank, by arithmetic: nothing is allocated.

P parameters are trained, P_x of them in experts, over W ranks, R of which share one set of experts. A number
has b bytes in the layout's dtype. T tokens and K experts per token go through each of A micro-batches.
"""

from dataclasses import dataclass

from megamoe.config.schema import RunConfig
from megamoe.parallel.ds_config import Layout
from megamoe.plan.inventory import Inventory, inventory
from megamoe.plan.memory import FP32_BYTES, MOMENT_BYTES, checkpoint_bytes, states_of
from megamoe.plan.traffic import choice_bytes, row_bytes
from megamoe.plan.workload import Workload, largest_top_k, workload


@dataclass(frozen=True)
class Needs:
    """Of one rank: bytes and operations.

    Attributes:
        all_reduce: gradients per step, b (P - P_x + P_x / R), without experts where R = W. What else is
            moved counts as a share of an all-reduce, see `megamoe.plan.traffic`: ZeRO 1 gathers what was
            updated as well, times 3 / 2; ZeRO 2 reduces for each micro-batch, times A + 1 / 2; ZeRO 3
            reduces to owners and gathers for each pass, times 3 A / 2.
        all_to_all: sent per step, in each mixture layer and micro-batch 4 b T C D: copies of tokens to the
            experts and sums back, forward and backward; 16 T K for the choices. Activation checkpointing
            repeats the forward pass. With dropout, 8 T C for keys in each forward pass. A token goes to C
            ranks in the mean, if routing is even: R (1 - binom(E - E/R, K) / binom(E, K)).
        all_to_all_message: b T C D.
        flops: floating-point operations per step, 6 for each active trained parameter and token.
        memory: where tensors compute: weights and gradients b each, Adam's moments 8, from stage 1 on fp32
            masters 4, divided as the ZeRO stage says; frozen numbers 4. From below: activations, the memory
            of Transformer-XL (in evaluation one for each k) and DeepSpeed's buckets come on top.
        host_memory: of the node, beside that: a checkpoint's copy while it is written, offloaded states.
        checkpoint: one checkpoint of all ranks: 12 P, 4 for each frozen number, and the model's memory.
    """

    all_reduce: int
    all_to_all: int
    all_to_all_message: int
    flops: float
    memory: int
    host_memory: int
    checkpoint: int


def needs_of(run: RunConfig, layout: Layout, *, offloads: bool = False) -> Needs:
    """What `run`, whose `model.vocab_size` is set, needs in `layout`.

    Args:
        offloads: optimizer states live in host memory.
    """
    known = inventory(run)
    load = workload(run, layout, on_gpu=False, top_k=largest_top_k(run))
    states = states_of(known, layout, offloads=offloads)
    copy = _held_for_checkpoint(known, layout) if run.checkpoint.async_write else 0
    active = known.counts.active(load.choices, run.moe.n_experts)
    return Needs(
        all_reduce=int(_shared(known, layout) * layout.dtype.itemsize * _reductions(layout)),
        all_to_all=_all_to_all(load),
        all_to_all_message=_message(load),
        flops=6.0 * active * load.tokens * layout.accumulation,
        memory=states.weights + states.gradients + states.optimizer + states.frozen,
        host_memory=states.host + copy,
        checkpoint=checkpoint_bytes(run, known, layout),
    )


def _reductions(layout: Layout) -> float:
    """What reducing the gradients of a step moves, in all-reduces."""
    accumulation = layout.accumulation
    return {0: 1, 1: 1.5, 2: accumulation + 0.5, 3: 1.5 * accumulation}[layout.zero_stage]


def _shared(known: Inventory, layout: Layout) -> int:
    """Numbers that this rank and others compute with."""
    return sum(share.held for share in known.shares(layout) if share.ranks > 1)


def _message(load: Workload) -> int:
    """Bytes of the rows that one exchange sends."""
    if load.layout.ep_size == 1 or not load.has_experts:
        return 0
    return int(load.tokens * load.copies * load.run.model.d_model * load.itemsize)


def _all_to_all(load: Workload) -> int:
    if load.layout.ep_size == 1 or not load.has_experts:
        return 0
    return load.mixtures * load.layout.accumulation * int(row_bytes(load) + choice_bytes(load))


def _held_for_checkpoint(known: Inventory, layout: Layout) -> int:
    """The copy that is written: masters and moments of this rank's share."""
    return (FP32_BYTES + MOMENT_BYTES) * sum(share.partition for share in known.shares(layout))
