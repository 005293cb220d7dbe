"""What one step and one checkpoint of a run ask of each rank, by arithmetic."""

from dataclasses import dataclass

import torch

from megamoe.config.schema import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.ds_config import Layout
from megamoe.training.banner import count_parameters

FP32_BYTES = 4
ADAM_STATES = 3
"""fp32 masters and two moments; pure fp32 training has no master beside its weights."""


@dataclass(frozen=True)
class Needs:
    """Bytes; `all_reduce` and `all_to_all` per rank and optimizer step, the rest as named.

    Attributes:
        all_reduce: gradients that this rank shares with others, in the layout's dtype: of all dense
            parameters, and of its experts / ep_size where several ranks hold them; once per step, from ZeRO
            stage 2 on once per micro-batch.
        all_to_all: rows that a rank sends to the owners of their experts and back, T * K * D numbers each
            way, in the forward and the backward pass (the forward twice with activation checkpointing).
        memory: weights, gradients and optimizer states of one rank, without activations.
        checkpoint: one checkpoint of all ranks, fp32 weights and Adam's moments.
    """

    all_reduce: int
    all_to_all: int
    memory: int
    checkpoint: int


def needs_of(run: RunConfig, layout: Layout) -> Needs:
    """What `run`, whose `model.vocab_size` is set, needs in `layout`."""
    with torch.device("meta"):
        model = TransformerXL(run.model, run.moe, seed=run.training.seed)
    counts = count_parameters(model)
    dense, experts = counts.trainable - counts.experts, counts.experts // layout.ep_size
    shared = dense + (experts if layout.ep_size < layout.world_size else 0)
    size = layout.dtype.itemsize
    reductions = layout.accumulation if layout.zero_stage >= 2 else 1
    return Needs(
        all_reduce=shared * size * reductions if layout.world_size > 1 else 0,
        all_to_all=_all_to_all(run, layout) if layout.ep_size > 1 else 0,
        memory=_memory(counts.frozen, dense, experts, layout),
        checkpoint=(counts.total + 2 * counts.trainable) * FP32_BYTES,
    )


def _all_to_all(run: RunConfig, layout: Layout) -> int:
    moe = run.moe
    n_layers = len(moe.layer_indices(run.model.n_layers))
    top_k = moe.top_k if moe.schedule.mode == "constant" else moe.schedule.max_k
    rows = layout.micro_batch_size * run.model.segment_len * top_k
    trips = 6 if run.training.activation_checkpointing else 4
    return rows * run.model.d_model * layout.dtype.itemsize * trips * n_layers * layout.accumulation


def _memory(frozen: int, dense: int, experts: int, layout: Layout) -> int:
    size, stage = layout.dtype.itemsize, layout.zero_stage
    # ZeRO divides over the ranks that hold the same parameters.
    shared = dense / layout.world_size + experts / (layout.world_size // layout.ep_size)
    mine = dense + experts
    weights = shared if stage >= 3 else mine
    gradients = shared if stage >= 2 else mine
    states = (ADAM_STATES - (size == FP32_BYTES)) * (shared if stage >= 1 else mine)
    return int((weights + gradients) * size + states * FP32_BYTES + frozen * FP32_BYTES)
