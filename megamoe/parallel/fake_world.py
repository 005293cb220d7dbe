"""One rank of a world whose other ranks do not exist: its process groups, and no communication."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamoe.errors import DistributedError
from megamoe.parallel.engine import require_accepted
from megamoe.parallel.launch import World, hand_to_deepspeed, import_before_a_group, quiet
from megamoe.parallel.layer import connect_experts

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Division:
    """The ranks of the world divided into process groups of one kind.

    Attributes:
        name: what the groups are for.
        groups: the ranks of each, in the order in which they are made.
    """

    name: str
    groups: tuple[Ranks, ...]

    def of(self, rank: int) -> Ranks:
        """The group of `rank`."""
        return next(ranks for ranks in self.groups if rank in ranks)


@contextmanager
def fake_world(world_size: int, rank: int, device: torch.device) -> Iterator[World]:
    """Be `rank` of a world on torch's fake backend, whose collectives move nothing; it is left at the end.

    Raises:
        DistributedError: this process belongs to a world already.
    """
    if dist.is_initialized():
        raise DistributedError("a process group is running in this process: leave it first")
    quiet(rank=0)
    import_before_a_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    world = World(rank, world_size, device)
    try:
        hand_to_deepspeed()
        yield world
    finally:
        world.shutdown()


def make_groups(model: nn.Module, ds_config: Mapping[str, Any]) -> tuple[Division, ...]:
    """Make the process groups of a run as DeepSpeed makes them when an engine starts, by the same functions.

    Args:
        model: with the mixture layers of `megamoe.parallel.layer.moe_layer_builder`.
        ds_config: as `resolve_ds_config` returns it, which DeepSpeed reads here too.

    Raises:
        ConfigError: DeepSpeed refuses its config.
    """
    require_accepted(ds_config)
    made = _record_groups()
    connect_experts(model)
    kinds = {"data parallel": dist.get_process_group_ranks(groups._get_data_parallel_group())}
    for name in groups._get_expert_parallel_group_dict():
        kinds["expert parallel"] = groups._get_expert_parallel_group_ranks(name)
        kinds["expert data parallel"] = groups._get_expert_data_parallel_group_ranks(name)
    divisions = _divisions(made, dist.get_world_size())
    return tuple(
        Division(kind, next(division for division in divisions if tuple(mine) in division))
        for kind, mine in kinds.items()
    )


def _record_groups() -> list[Ranks]:
    """A list that grows by the ranks of each group which DeepSpeed makes until the world is left.

    A process keeps only those groups that it is a member of.
    """
    made: list[Ranks] = []
    backend = deepspeed.comm.comm.cdb
    new_group = backend.new_group

    def record(ranks: Sequence[int]) -> Any:
        made.append(tuple(ranks))
        return new_group(ranks)

    backend.new_group = record
    return made


def _divisions(made: Sequence[Ranks], world_size: int) -> list[tuple[Ranks, ...]]:
    """Groups in the order in which they were made, kind by kind: those of one kind hold every rank once."""
    divisions: list[tuple[Ranks, ...]] = []
    n_left = 0
    for ranks in made:
        if n_left == 0:
            divisions.append(())
            n_left = world_size
        divisions[-1] += (ranks,)
        n_left -= len(ranks)
    return divisions
