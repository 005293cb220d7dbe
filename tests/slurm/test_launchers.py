"""Ranks on two nodes meet without being told an address, and refuse variables that are left over."""

import re
import sys
from pathlib import Path

import pytest

from tests.launchers import require_mpirun
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]
PYTHON = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable)
MEET = """
import torch
from megamoe.parallel.launch import read_launch, start
launch = read_launch()
world = start(launch)
total = int(world.sum(torch.tensor([world.rank + 1])))
print(f"{launch.launcher} meets at {launch.address[0]}: {total}", flush=True)
world.shutdown()
"""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def test_srun_and_mpirun_meet_at_the_node_of_rank_0(cluster: Cluster) -> None:
    by_srun = cluster.run("srun", *TWO_NODES, *PYTHON, "-c", MEET)
    assert by_srun.stdout.splitlines() == ["srun meets at node1: 3"] * 2
    by_mpirun = cluster.run("salloc", *TWO_NODES, *require_mpirun(), *PYTHON, "-c", MEET)
    # mpirun may join two lines.
    assert (
        re.findall(r"Open MPI meets at [\d.]+: \d+", by_mpirun.stdout)
        == [
            "Open MPI meets at 198.51.100.1: 3",
        ]
        * 2
    )


@pytest.mark.parametrize(
    ("left_over", "refusal"),
    [
        (
            ("RANK=0", "WORLD_SIZE=1"),
            "WORLD_SIZE = 1: srun started 2 processes (SLURM_STEP_NUM_TASKS); unset",
        ),
        (("RANK=1", "WORLD_SIZE=2"), "RANK = 1: srun counts this process as 0 (SLURM_PROCID); unset"),
    ],
)
def test_variables_left_over_are_refused_in_one_line(
    cluster: Cluster, left_over: tuple[str, ...], refusal: str
) -> None:
    train = ("-m", "megamoe", "train", "--preset", "tiny_enwik8", "name=refused")
    done = cluster.run("srun", *TWO_NODES, "env", *left_over, *PYTHON, *train, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("megamoe:"))
    assert line.startswith(f"megamoe: error: {refusal}")
