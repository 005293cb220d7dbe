"""Ranks that are tied to each other while they start up."""

import signal
from pathlib import Path

import pytest

from tests.processes import PATIENCE_SECONDS, ranks

pytestmark = pytest.mark.distributed

# What a rank does while it is tied, and after; it waits for nobody in there.
PROGRAM = """
import os, resource, sys, time
from megamoe.errors import ConfigError
from megamoe.parallel.launch import read_launch, start
from megamoe.parallel.tie import tied

launch = read_launch()
world = start(launch)


def leave_room_for_two_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for file in held[-2:]:
            os.close(file)


if sys.argv[1] == "full" and launch.rank == 0:
    leave_room_for_two_files()
try:
    with tied(world, launch.address[0]):
        print("tied", flush=True)
        if sys.argv[1] == "stay":
            time.sleep(600)
        if sys.argv[1] == "full":
            time.sleep(4)
        world.barrier()
        if sys.argv[1] == "refuse":
            raise ConfigError("all ranks refuse")
except ConfigError:
    pass
time.sleep((launch.rank + int(sys.argv[2])) % 3)
"""


def test_all_end_when_one_dies(tmp_path: Path) -> None:
    with ranks(3, "stay", "0", folder=tmp_path, program=("-c", PROGRAM)) as processes:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "tied\n"
        processes[1].kill()
        said = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [76, -signal.SIGKILL, 76], said
    assert said[0] == "megamoe: error: rank 0 lost rank 1 before the first step\n"
    assert said[2] == "megamoe: error: rank 2 lost rank 0 before the first step\n"


@pytest.mark.parametrize(("how", "order"), [("agree", 0), ("refuse", 1)])
def test_who_is_released_may_leave_in_any_order(tmp_path: Path, how: str, order: int) -> None:
    """Rank 0 first, and rank 0 after rank 2."""
    with ranks(3, how, str(order), folder=tmp_path, program=("-c", PROGRAM)) as processes:
        said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said


def test_ranks_that_cannot_be_watched_start_nevertheless(tmp_path: Path) -> None:
    """Rank 0 can open what it listens with, and no connection."""
    with ranks(3, "full", "0", folder=tmp_path, program=("-c", PROGRAM)) as processes:
        said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert "megamoe: rank 0: not every rank is watched while they start ([Errno 24]" in said[0][1]
