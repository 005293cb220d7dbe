"""Every routing policy in the real trainer: bf16, ZeRO, experts over two ranks, and a cut in the middle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.reader import find_latest
from megamoe.config.schema import RouterConfig, RunConfig
from megamoe.moe.routers.registry import BUILT_IN
from megamoe.parallel.launch import World, read_launch, start
from tests.checkpoint.runs import differing
from tests.ranks import run_ranks
from tests.training.runs import BF16, toy_run, train_toy

pytestmark = pytest.mark.distributed

# What a policy has to carry over the cut happens in these few steps.
BUSY: dict[str, dict[str, Any]] = {
    "compete": {"rate": 0.5},
    "similarity": {"frequency": 0.3, "threshold": -1.0},
    "stable": {"stage_steps": 4},
}
CUT, LAST = 5, 7


def run_of(folder: Path, policy: str, name: str) -> RunConfig:
    run = toy_run(
        folder, name=name,
        moe={"ep_size": 2, "balance_loss": "auto", "schedule": {"mode": "constant"}},
        training={"max_steps": LAST, "micro_batch_size": 1},
        evaluation={"every": 0, "allow_noncausal": True, "top_ks": [2]}, logging={"every": 100},
    )  # fmt: skip
    router = RouterConfig(name=policy, options=BUSY.get(policy, {}))
    return replace(run, moe=replace(run.moe, router=router))


def train_all(root: str, policies: list[str]) -> None:
    world = start(read_launch())
    for policy in policies:
        train_twice(world, Path(root) / policy, policy)


def train_twice(world: World, folder: Path, policy: str) -> None:
    train_toy(run_of(folder, policy, "uncut"), BF16, world)
    cut = run_of(folder, policy, "cut")
    train_toy(cut, BF16, world, cut_after=CUT + 1)
    train_toy(cut, BF16, world, resume=find_latest(folder / "cut"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for first in range(0, len(BUILT_IN), 8):
        run_ranks(train_all, 2, str(folder), list(BUILT_IN)[first : first + 8])
    return folder


@pytest.mark.parametrize("policy", BUILT_IN)
def test_a_resumed_run_repeats_the_uncut_one_bit_for_bit(trained: Path, policy: str) -> None:
    folders = [trained / policy / run / "checkpoints" / step_folder(LAST) for run in ("uncut", "cut")]
    assert differing(*folders) == []
    assert len(differing(folders[0], trained / policy / "uncut" / "checkpoints" / step_folder(CUT))) > 20
