"""The parameters of a run's model, by the groups in which they are optimized; nothing is allocated."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from megamoe.config.schema import RunConfig
from megamoe.models.parameter_counts import ParameterCounts, parameter_counts
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.ds_config import Layout
from megamoe.parallel.optimizer import parameter_groups

ALIGNMENT = 2
"""DeepSpeed pads a group's numbers to a multiple of this many for each rank."""

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed flattens into one tensor, in its order.

    Attributes:
        role: as `parameter_groups` calls it.
        sizes: numbers of each parameter, of all ranks together.
    """

    role: str
    sizes: Sizes

    @property
    def of_experts(self) -> bool:
        """Whether they are spread over expert-parallel ranks."""
        return self.role.startswith("experts")


@dataclass(frozen=True)
class Share:
    """A group as one rank has it under a layout.

    Attributes:
        sizes: numbers of each parameter that the rank computes with.
        ranks: those that compute with the same ones, and divide their states.
    """

    sizes: Sizes
    ranks: int

    @property
    def held(self) -> int:
        """Numbers that the rank computes with."""
        return sum(self.sizes)

    @property
    def padded(self) -> int:
        """The same flattened, a whole number of partitions."""
        alignment = ALIGNMENT * self.ranks
        return math.ceil(self.held / alignment) * alignment

    @property
    def partition(self) -> int:
        """Numbers whose states one rank keeps."""
        return self.padded // self.ranks

    def touched(self, place: int) -> int:
        """Numbers of all parameters of which a part is in partition `place`."""
        return _touched(self.sizes, self.ranks)[place]


@dataclass(frozen=True)
class Inventory:
    """A model's parameters.

    Attributes:
        groups: of the trained ones.
        counts: of all.
    """

    groups: tuple[Group, ...]
    counts: ParameterCounts

    def shares(self, layout: Layout) -> list[Share]:
        """What one rank holds of each group. At stage 3 experts are as all others."""
        spread = layout.ep_size if layout.zero_stage < 3 else 1
        return [
            Share(tuple(size // spread for size in group.sizes), layout.world_size // spread)
            if group.of_experts
            else Share(group.sizes, layout.world_size)
            for group in self.groups
        ]


def inventory(run: RunConfig) -> Inventory:
    """Of the language model of `run`, whose vocabulary is known."""
    with torch.device("meta"):
        model = TransformerXL(run.model, run.moe, seed=run.training.seed)
    groups = tuple(
        Group(group["role"], tuple(parameter.numel() for parameter in group["params"]))
        for group in parameter_groups(model, run.optimizer.weight_decay)
    )
    return Inventory(groups, parameter_counts(model))


@lru_cache(maxsize=256)
def _touched(sizes: Sizes, n_ranks: int) -> list[int]:
    """By partition; see `Share.touched`."""
    partition = Share(sizes, n_ranks).partition
    touched, start = [0] * n_ranks, 0
    for size in sizes:
        for place in range(start // partition, (start + size - 1) // partition + 1):
            touched[place] += size
        start += size
    return touched
