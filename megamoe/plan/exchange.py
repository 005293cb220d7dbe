"""Bytes of rows on their way to experts on other ranks, and at them.

A token travels once to each rank that owns one of its experts: T C copies, C from `ranks_per_token`. If
routing is even, as many arrive. In the worst case the R T tokens of all ranks that share these experts do.
"""

from megamoe.plan.activations import INDEX, WIDE, kept_per_choice
from megamoe.plan.workload import Workload

IN_TRANSIT = 3
"""Rows that leave, and results that come back and are summed."""


def balanced_exchange(load: Workload) -> int:
    """Bytes on one rank if all experts get equally many choices; 0 where all experts are at hand."""
    copies = load.tokens * load.copies
    return _exchange(load, arrived=copies)


def worst_exchange(load: Workload) -> int:
    """The same if all tokens choose experts of this rank, and what these keep of more choices."""
    everything = load.tokens * load.layout.ep_size
    chosen = everything * min(load.choices, load.local_experts)
    more = max(0.0, chosen - load.tokens * load.choices)
    found = _exchange(load, arrived=everything)
    return found + int(more * kept_per_choice(load) * _layers_kept(load)) if found else 0


def _exchange(load: Workload, arrived: float) -> int:
    """Rows in transit of one layer, and those that arrived, which each layer keeps for its backward pass."""
    if load.layout.ep_size == 1 or not load.has_experts:
        return 0
    row = load.run.model.d_model * load.itemsize
    wide = load.run.model.d_model * WIDE if load.itemsize < WIDE else 0
    in_transit = load.tokens * load.copies * (IN_TRANSIT * row + wide)
    return int(in_transit + arrived * (row + 2 * INDEX) * _layers_kept(load))


def _layers_kept(load: Workload) -> int:
    """Layers that hold what arrived at the same time; with checkpointing one."""
    return 1 if load.run.training.activation_checkpointing else load.mixtures
