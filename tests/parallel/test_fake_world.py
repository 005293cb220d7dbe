"""Process groups of worlds that one process makes by itself: as by hand, and as real ranks make them."""

from typing import Any

import deepspeed.comm.comm
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from megamoe.errors import ConfigError, DistributedError
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.parallel.engine import build_model
from megamoe.parallel.fake_world import fake_world, make_groups
from megamoe.parallel.launch import read_launch, start
from tests.parallel.runs import VOCAB, build_engine, small_run
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ZERO1 = {"zero_optimization": {"stage": 1}}

Groups = dict[str, tuple[tuple[int, ...], ...]]


def groups_of(
    world_size: int, moe: dict[str, Any] | None = None, rank: int = 0, ds: dict[str, Any] = ZERO1
) -> Groups:
    """By name, as `rank` of a fake world makes them."""
    run = small_run(moe=moe or {}, training={"batch_size": 2048})
    resolved = resolve_ds_config(run, ds, world_size, Device("cpu", bf16=False, fp16=False))
    with fake_world(world_size, rank, CPU) as world:
        with torch.device("meta"):
            model = build_model(run, layout_of(run, resolved, world_size), world, VOCAB)
        return {division.name: division.groups for division in make_groups(model, resolved)}


def test_groups_of_8_ranks() -> None:
    assert groups_of(8, {"n_experts": 4}) == {
        "data parallel": ((0, 1, 2, 3, 4, 5, 6, 7),),
        "expert parallel": ((0, 1, 2, 3), (4, 5, 6, 7)),
        "expert data parallel": ((0, 4), (1, 5), (2, 6), (3, 7)),
    }


@pytest.mark.parametrize(
    ("world_size", "moe", "ep_size"),
    [
        (64, {"n_experts": 16}, 16),
        (1024, {"n_experts": 16}, 16),
        (1024, {"n_experts": 256, "ep_size": 8}, 8),
        (1024, {"n_experts": 1024}, 1024),
        (1024, {"n_experts": 3}, 1),
    ],
)
@pytest.mark.parametrize("rank", [0, 37])
def test_groups_of_many_ranks(world_size: int, moe: dict[str, Any], ep_size: int, rank: int) -> None:
    """Ranks in a row share a set of experts; those in the same place of it hold the same ones."""
    assert groups_of(world_size, moe, rank) == {
        "data parallel": (tuple(range(world_size)),),
        "expert parallel": tuple(
            tuple(range(first, first + ep_size)) for first in range(0, world_size, ep_size)
        ),
        "expert data parallel": tuple(tuple(range(place, world_size, ep_size)) for place in range(ep_size)),
    }


@pytest.mark.parametrize(("moe", "stage"), [({"layers": "none"}, 1), ({"ep_size": 1}, 3)])
def test_without_spread_experts_ranks_are_data_parallel_alone(moe: dict[str, Any], stage: int) -> None:
    ds = {"zero_optimization": {"stage": stage}}
    assert groups_of(4, moe, ds=ds) == {"data parallel": ((0, 1, 2, 3),)}


def real_groups(ep_sizes: list[int]) -> list[dict[str, tuple[int, ...]]]:
    """For each ep_size the groups of this rank in an engine that DeepSpeed has started."""
    world = start(read_launch())
    found = []
    for ep_size in ep_sizes:
        engine = build_engine(small_run(moe={"ep_size": ep_size}), ZERO1, world)
        (name,) = engine.deepspeed.expert_parallel_group
        found.append({
            "data parallel": tuple(dist.get_process_group_ranks(engine.deepspeed.data_parallel_group)),
            "expert parallel": tuple(groups._get_expert_parallel_group_ranks(name)),
            "expert data parallel": tuple(groups._get_expert_data_parallel_group_ranks(name)),
        })  # fmt: skip
        assert dist.get_process_group_ranks(groups._get_expert_parallel_group(name)) == list(
            found[-1]["expert parallel"]
        )
    return found


@pytest.mark.distributed
def test_the_groups_are_those_of_real_ranks() -> None:
    ep_sizes = [1, 2, 4]
    expected = [groups_of(4, {"ep_size": ep_size}) for ep_size in ep_sizes]
    for rank, found in enumerate(run_ranks(real_groups, 4, ep_sizes)):
        for mine, all_groups in zip(found, expected, strict=True):
            assert mine.keys() == all_groups.keys()
            for kind, ranks in mine.items():
                assert rank in ranks
                assert ranks in all_groups[kind]


def test_nothing_is_left_of_a_world() -> None:
    with pytest.raises(RuntimeError, match="inside"), fake_world(8, 3, CPU) as world:
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
        assert (world.rank, world.world_size, world.is_main) == (3, 8, False)
        groups._clone_world_group()
        raise RuntimeError("inside")
    assert not dist.is_initialized()
    assert deepspeed.comm.comm.cdb is None
    assert groups._WORLD_GROUP is None and not groups._EXPERT_PARALLEL_GROUP


def test_one_world_at_a_time() -> None:
    with (
        fake_world(2, 0, CPU),
        pytest.raises(DistributedError, match="a process group is running"),
        fake_world(4, 0, CPU),
    ):
        pass
    assert not dist.is_initialized()


def test_what_deepspeed_refuses_is_a_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"^the DeepSpeed config is refused by DeepSpeed: ") as refusal:
        groups_of(2, ds={**ZERO1, "communication_data_type": "fp8"})
    assert "\n" not in str(refusal.value)
    assert not dist.is_initialized()
