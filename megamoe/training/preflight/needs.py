"""What one step and one checkpoint of a run ask of each rank, by arithmetic: nothing is allocated.

P parameters are trained, P_x of them in experts, over W ranks, R of which share one set of experts. A number
has b bytes in the layout's dtype. T tokens and K experts per token go through each of A micro-batches.
"""

import math
from dataclasses import dataclass

import torch

from megamoe.config.schema import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routers import router_class
from megamoe.parallel.ds_config import Layout
from megamoe.training.banner import ParameterCounts, count_parameters

FP32_BYTES = 4
MOMENT_BYTES = 8
"""Adam's two."""
KEY_BYTES = 8
"""What names a token to the ranks that draw its dropout."""
WEIGHT_BYTES, CODE_BYTES = 4, 8
"""Of a choice: its weight, which has a gradient, and what says of which token and expert it is."""


@dataclass(frozen=True)
class Needs:
    """Of one rank: bytes and operations.

    Attributes:
        all_reduce: gradients per step, b (P - P_x + P_x / R), without experts where R = W. ZeRO 1 reduces
            to owners and gathers what they have updated, the two halves of an all-reduce; ZeRO 2 does the
            first half for each micro-batch, times (A + 1) / 2; ZeRO 3 gathers for each pass as well,
            times 3 A / 2.
        all_to_all: sent per step, in each mixture layer and micro-batch 4 b T C D: copies of tokens to the
            experts and sums back, forward and backward; 16 T K for the choices. Activation checkpointing
            repeats the forward pass. With dropout, 8 T C for keys in each forward pass. A token goes to C
            ranks in the mean, if routing is even: R (1 - binom(E - E/R, K) / binom(E, K)).
        all_to_all_message: b T C D.
        flops: floating-point operations per step, 6 for each active trained parameter and token.
        memory: where tensors compute: weights and gradients b each, Adam's moments 8, fp32 masters 4 where
            b < 4, divided as the ZeRO stage says; frozen numbers 4. From below: activations, the memory of
            Transformer-XL (in evaluation one for each k) and DeepSpeed's buckets come on top.
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
    with torch.device("meta"):
        counts = count_parameters(TransformerXL(run.model, run.moe, seed=run.training.seed))
    top_k = _experts_per_token(run)
    tokens = layout.micro_batch_size * run.model.segment_len
    copies = tokens * _ranks_per_token(run.moe.n_experts, top_k, layout.ep_size)
    message = int(copies * run.model.d_model * layout.dtype.itemsize) if layout.ep_size > 1 else 0
    memory, host_memory = _memory(run, layout, counts, offloads=offloads)
    return Needs(
        all_reduce=int(_shared(counts, layout) * layout.dtype.itemsize * _reductions(layout)),
        all_to_all=_all_to_all(run, layout, message, copies, tokens * top_k),
        all_to_all_message=message,
        flops=6.0 * counts.active(top_k, run.moe.n_experts) * tokens * layout.accumulation,
        memory=memory,
        host_memory=host_memory,
        checkpoint=_checkpoint(run, layout, counts),
    )


def _experts_per_token(run: RunConfig) -> int:
    """The most that any step uses."""
    schedule = run.moe.schedule
    top_k = run.moe.top_k if schedule.mode == "constant" else schedule.max_k
    return router_class(run.moe.router.name).experts_per_token(top_k, run.moe.n_experts)


def _reductions(layout: Layout) -> float:
    """What reducing the gradients of a step moves, in all-reduces."""
    if layout.world_size == 1:
        return 0
    if layout.zero_stage == 3:
        return 1.5 * layout.accumulation
    return (layout.accumulation + 1) / 2 if layout.zero_stage == 2 else 1


def _ranks_per_token(n_experts: int, top_k: int, n_ranks: int) -> float:
    """How many of `n_ranks` own one of `top_k` experts, of which all are equally likely."""
    elsewhere = math.comb(n_experts - n_experts // n_ranks, top_k)
    return n_ranks * (1 - elsewhere / math.comb(n_experts, top_k))


def _all_to_all(run: RunConfig, layout: Layout, message: int, copies: float, choices: int) -> int:
    if layout.ep_size == 1:
        return 0
    forwards = 2 if run.training.activation_checkpointing else 1
    keys = KEY_BYTES * copies if run.model.dropout > 0 else 0
    exchanges = len(run.moe.layer_indices(run.model.n_layers)) * layout.accumulation
    named = choices * ((WEIGHT_BYTES + CODE_BYTES) * forwards + WEIGHT_BYTES)
    return exchanges * int(2 * message * (forwards + 1) + named + keys * forwards)


def _held(counts: ParameterCounts, layout: Layout) -> int:
    """Trained parameters that one rank computes with."""
    return counts.trainable - counts.experts + counts.experts // layout.ep_size


def _shared(counts: ParameterCounts, layout: Layout) -> int:
    """Of these, the ones that other ranks compute with, too."""
    alone = counts.experts // layout.ep_size if layout.ep_size == layout.world_size else 0
    return _held(counts, layout) - alone


def _memory(
    run: RunConfig, layout: Layout, counts: ParameterCounts, *, offloads: bool
) -> tuple[int, int]:  # fmt: skip
    """Bytes where tensors compute, and in host memory."""
    held, size, stage = _held(counts, layout), layout.dtype.itemsize, layout.zero_stage
    # The ranks that hold the same parameters divide them; over all sets of experts, that is P / W each.
    share = -(-counts.trainable // layout.world_size)
    weights = size * (share if stage == 3 else held) + FP32_BYTES * counts.frozen
    gradients = size * (share if stage >= 2 else held)
    masters = FP32_BYTES if size < FP32_BYTES else 0
    states = (MOMENT_BYTES + masters) * (share if stage >= 1 else held)
    copy = (FP32_BYTES + MOMENT_BYTES) * share if run.checkpoint.async_write else 0
    device = weights + gradients + (0 if offloads else states)
    return device, copy + (states if offloads else 0)


def _checkpoint(run: RunConfig, layout: Layout, counts: ParameterCounts) -> int:
    model = run.model
    memory = model.n_layers * run.training.batch_size * model.memory_len * model.d_model
    trained = (FP32_BYTES + MOMENT_BYTES) * counts.trainable
    return trained + FP32_BYTES * counts.frozen + memory * layout.dtype.itemsize
