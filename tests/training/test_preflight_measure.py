"""What ranks measure together, where one of them is the odd one out."""

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.parallel.launch import read_launch, start
from megamoe.training.preflight import measure
from megamoe.training.preflight.disk import measure_disk
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def measured(folders: list[Path]) -> dict[str, Any]:
    """Rank 1 has a clock that is 7 s ahead, another folder, and later a disk that takes nothing."""
    world = start(read_launch())
    apart = measure_disk(world, folders[world.rank], "apart")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    full = measure_disk(world, folders[0], "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    flops = measure.arithmetic_speed(world, torch.float32)
    link = measure.best_link(world, ["one", "two"])
    if world.rank:
        time.time = lambda ahead=7, now=time.time: now() + ahead
    return {
        "apart": apart, "full": full, "flops": flops, "link": link, "clock": measure.clock_ahead(world),
        "speeds": measure.collective_speeds(world, ep_size=2),
    }  # fmt: skip


def test_the_odd_rank_is_seen_by_itself(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    found = run_ranks(measured, 2, folders)
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
    assert [rank["apart"]["shared_folder"] for rank in found] == [True, False]
    assert [rank["full"]["shared_folder"] for rank in found] == [True, True]
    assert not any("disk_error" in rank["apart"] for rank in found)
    assert "disk_error" not in found[0]["full"]
    assert found[1]["full"]["disk_error"] == f"{folders[0]}: File too large"
    assert [rank["clock"] for rank in found] == [0.0, pytest.approx(7, abs=1)]
    for rank in found:
        assert min(rank["flops"], rank["link"]) > 0
        assert all(
            set(speeds) == set(measure.MESSAGE_BYTES) and min(speeds.values()) > 0
            for speeds in rank["speeds"].values()
        )
