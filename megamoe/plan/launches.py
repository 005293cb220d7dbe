"""How many kernels a step starts: where batches are small, starting them takes longer than they do.

Counts of operations that torch dispatches, views left out, in models of one layer more and one less; a test
counts again. What DeepSpeed starts for each parameter, and what an exchange does, is read from their code.
"""

import math

from megamoe.models.attention import QUERY_BLOCK
from megamoe.models.attention_core import MOST_SCORES_AT_ONCE, SCORES_AT_ONCE
from megamoe.plan.inventory import Inventory
from megamoe.plan.workload import Workload

LAYER = (19, 38)
"""Forward and backward, of a layer without experts and without its pieces of attention."""
PIECE = (10, 20)
DROPOUT = (35, 2)
"""Of one mask, which is drawn by integer arithmetic; a layer has three, and so have its ends."""
GROUPED_MIXTURE = (50, 22)
"""More than of a dense network; elsewhere experts are computed one by one."""
EXPERT = (40, 22)
EXCHANGE = (45, 15)
ENDS = (65, 30)
"""Embedding, distances, output, loss."""
PER_PARAMETER = 10
"""Copies into buckets, out and flat, and the norm."""


def launches(load: Workload, inventory: Inventory) -> float:
    """Kernels of one optimizer step."""
    model, recomputes = load.run.model, load.run.training.activation_checkpointing
    dropouts = _times(DROPOUT, 3 if model.dropout else 0)
    layer = _sum(LAYER, dropouts, _times(PIECE, attention_pieces(load)))
    ends = _sum(ENDS, dropouts)
    total = _sum(ends, _times(layer, model.n_layers), _times(_mixture(load), load.mixtures))
    # Routing and residual streams are not computed again; of a layer's kernels they are few.
    passes = total[0] + total[1] + (total[0] - ends[0] if recomputes else 0)
    tensors = sum(len(group.sizes) for group in inventory.groups)
    return load.layout.accumulation * passes + PER_PARAMETER * tensors


def attention_pieces(load: Workload) -> int:
    """Blocks of queries, times the groups of heads and rows that are computed at once."""
    model = load.run.model
    most = MOST_SCORES_AT_ONCE if load.on_gpu else SCORES_AT_ONCE["cpu"]
    at_once = max(1, most // (min(QUERY_BLOCK, model.segment_len) * load.context))
    heads = math.ceil(model.n_heads / max(1, at_once // load.batch))
    rows = math.ceil(load.batch / min(at_once, load.batch))
    return math.ceil(model.segment_len / QUERY_BLOCK) * heads * rows


def _mixture(load: Workload) -> tuple[float, float]:
    if not load.has_experts:
        return 0, 0
    exchange = EXCHANGE if load.layout.ep_size > 1 else (0, 0)
    if load.grouped:
        return _sum(GROUPED_MIXTURE, exchange)
    return _sum(_times(EXPERT, load.local_experts), exchange)


def _times(counts: tuple[float, float], number: int) -> tuple[float, float]:
    return counts[0] * number, counts[1] * number


def _sum(*counts: tuple[float, float]) -> tuple[float, float]:
    return sum(pair[0] for pair in counts), sum(pair[1] for pair in counts)
