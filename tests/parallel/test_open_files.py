"""The limit of open files is raised to what the ranks need, where that is allowed."""

import subprocess
import sys

import pytest

from tests.environment import environment

PROGRAM = """
import resource, sys
from megamoe.errors import DistributedError
from megamoe.parallel.open_files import allow_connections

soft, hard, rank, world_size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    allow_connections(rank, world_size)
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
except DistributedError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limits", "rank", "world_size", "said"),
    [
        ((600, 4096), 0, 20, "600 4096"),
        ((600, 4096), 0, 100, "912 4096"),
        ((600, 4096), 5, 1500, "4096 4096"),
        ((600, 4096), 5, 4000, "4096 4096"),
        (
            (600, 4096), 0, 2049,
            "ulimit -Hn = 4096: rank 0 keeps 2 connections to each of 2049 ranks while they start; allow 8708"
            " open files on its node",
        ),
    ],
)  # fmt: skip
def test_limits_follow_the_ranks(limits: tuple[int, int], rank: int, world_size: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (*limits, rank, world_size))],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert done.stdout.strip() == said
