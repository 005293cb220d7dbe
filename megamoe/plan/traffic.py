"""Bytes that one rank sends in an optimizer step, by collective and by network.

Reductions and gathers go round rings, as NCCL's do. With n ranks and a tensor of z bytes a rank sends

    all-reduce  2 (n - 1) / n z      reduce-scatter, all-gather  (n - 1) / n z

and where m of the n ranks are on each node, one in m of these bytes leaves the node: there are as many
rings as ranks on a node, and each leaves it once. In an all-to-all every rank sends to every other itself.

What DeepSpeed calls: at stage 0 an all-reduce of the gradients; at stage 1 too, then an all-gather of the
weights that were updated; at stage 2 an all-reduce for each micro-batch, and that all-gather; at stage 3 a
reduce-scatter of gradients, and all-gathers of the weights for the forward and for the backward pass. Stages
1 and 2 reduce-scatter nothing, whatever the option `reduce_scatter` says, as long as
`use_multi_rank_bucket_allreduce` is on. Experts go over the ranks that hold the same ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megamoe.parallel.ds_config import Layout
from megamoe.plan.devices import Cluster
from megamoe.plan.inventory import Inventory
from megamoe.plan.memory import bucket_size
from megamoe.plan.workload import Workload

COUNT_BYTES = 16
"""Of copies and of choices for one rank, exchanged before them."""
KEY_BYTES = 8
"""What names a token to the ranks that draw its dropout."""
WEIGHT_BYTES, CODE_BYTES = 4, 8
"""Of a choice: its weight, which has a gradient, and what says of which token and expert it is."""
STAGE_3_GATHERS = 2
"""Before the forward and before the backward pass of each micro-batch."""


class Moved(NamedTuple):
    """What one rank's calls of a collective move in a step.

    Attributes:
        calls: with other ranks.
        tensors: bytes of what is reduced, gathered or exchanged, the rank's own share included.
        fast: bytes sent within the node.
        slow: bytes sent to other nodes.
    """

    calls: float = 0
    tensors: float = 0
    fast: float = 0
    slow: float = 0

    @property
    def total(self) -> float:
        """Bytes sent to other ranks."""
        return self.fast + self.slow

    def __add__(self, other: "Moved") -> "Moved":  # type: ignore[override]
        return Moved(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Traffic:
    """Of one optimizer step and rank; small ones, of norms and statistics, are left out."""

    all_to_all: Moved
    all_reduce: Moved
    reduce_scatter: Moved
    all_gather: Moved


def traffic(load: Workload, inventory: Inventory, cluster: Cluster, ds: Mapping[str, Any]) -> Traffic:
    """What `load`'s layout moves on `cluster`, if routing is even."""
    bucket = bucket_size(ds, on_gpu=load.on_gpu)
    reduced = scattered = gathered = Moved()
    for share in inventory.shares(load.layout):
        network = Ring(share.ranks, load.layout.world_size // share.ranks, cluster.gpus_per_node)
        size, accumulation = load.layout.dtype.itemsize, load.layout.accumulation
        calls = math.ceil(share.held / bucket)
        if load.layout.zero_stage == 3:
            scattered += network.moved(size * share.held, 1, accumulation * calls, accumulation)
            times = STAGE_3_GATHERS * accumulation
            gathered += network.moved(size * share.held, 1, times * len(share.sizes), times)
            continue
        times = accumulation if load.layout.zero_stage == 2 else 1
        reduced += network.moved(size * share.held, 2, times * calls, times)
        if load.layout.zero_stage > 0:
            gathered += network.moved(size * share.padded, 1, 1, 1)
    return Traffic(_all_to_all(load, cluster), reduced, scattered, gathered)


class Ring(NamedTuple):
    """So many ranks in equal distances, some of them on each node."""

    n_ranks: int
    distance: int
    per_node: int

    def moved(self, n_bytes: float, rounds: int, calls: float, times: int) -> Moved:
        """By `calls` collectives that move `n_bytes` together, `times` times."""
        if self.n_ranks == 1:
            return Moved()
        sent = rounds * (self.n_ranks - 1) / self.n_ranks * n_bytes * times
        neighbours = min(self.n_ranks, max(1, self.per_node // self.distance))
        slow = 0.0 if neighbours == self.n_ranks else sent / neighbours
        return Moved(calls, n_bytes * times, sent - slow, slow)


def choice_bytes(load: Workload) -> float:
    """Bytes of one dispatch and its way back that are of choices and not of rows, backward pass included."""
    forwards = 2 if load.run.training.activation_checkpointing else 1
    return load.tokens * load.choices * ((WEIGHT_BYTES + CODE_BYTES) * forwards + WEIGHT_BYTES)


def row_bytes(load: Workload) -> float:
    """The same of rows and keys: there and back, forward and backward."""
    forwards = 2 if load.run.training.activation_checkpointing else 1
    copies = load.tokens * load.copies
    keys = KEY_BYTES * copies if load.run.model.dropout else 0
    return 2 * copies * load.run.model.d_model * load.itemsize * (forwards + 1) + keys * forwards


def _all_to_all(load: Workload, cluster: Cluster) -> Moved:
    layout = load.layout
    if layout.ep_size == 1 or not load.has_experts:
        return Moved()
    forwards = 2 if load.run.training.activation_checkpointing else 1
    exchanges = load.mixtures * layout.accumulation
    tensors = row_bytes(load) + choice_bytes(load) + COUNT_BYTES * layout.ep_size * forwards
    # Forward numbers, rows, codes, weights, keys and results; backward rows, weights and results.
    calls = (6 if load.run.model.dropout else 5) * forwards + 3
    per_rank = exchanges * tensors / layout.ep_size
    near = _neighbours(layout, cluster)
    return Moved(
        exchanges * calls, exchanges * tensors, per_rank * near, per_rank * (layout.ep_size - 1 - near)
    )


def _neighbours(layout: Layout, cluster: Cluster) -> int:
    """Other ranks of the same set of experts and the same node, for the rank that has fewest."""
    nodes = [rank // cluster.gpus_per_node for rank in range(layout.world_size)]
    groups = [nodes[first : first + layout.ep_size] for first in range(0, layout.world_size, layout.ep_size)]
    return min(group.count(node) - 1 for group in groups for node in set(group))
