"""The templates in slurm/: accepted by sbatch, whole, and for numbers of tasks that their presets fit."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe.config import load_config
from megamoe.config.presets import CORPORA
from tests.slurm.cluster import Cluster

FOLDER = Path(__file__).parents[2] / "slurm"
SIZES = ("small", "medium", "large", "xl")
TRAINING = [f"{size}_{corpus}" for size in SIZES for corpus in CORPORA]
OTHERS = ["compare_routers", "evaluate", "finetune_sst2", "preflight", "prepare_data"]
TEMPLATES = [*TRAINING, *OTHERS]


def directives(name: str) -> dict[str, str]:
    text = (FOLDER / f"{name}.sh").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, flags=re.MULTILINE))


def test_each_is_tested_here():
    assert {path.stem for path in FOLDER.glob("*.sh")} == {*TEMPLATES, "launch"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_directive_is_lost(name):
    """sbatch reads none after the first command, and says nothing."""
    lines = (FOLDER / f"{name}.sh").read_text().splitlines()
    commands = [i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    last_directive = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_directive < commands[0]
    assert len(directives(name)) == sum(line.startswith("#SBATCH") for line in lines)


@pytest.fixture(scope="module")
def wide_cluster(able_machine: None) -> Iterator[Cluster]:
    """As many nodes as the largest template asks for."""
    with Cluster(nodes=max(int(directives(name).get("nodes", 1)) for name in TEMPLATES)) as cluster:
        yield cluster


@pytest.mark.parametrize("name", TEMPLATES)
def test_sbatch_accepts_it(wide_cluster: Cluster, name):
    done = wide_cluster.run("sbatch", "--test-only", FOLDER / f"{name}.sh")
    assert "to start at" in done.stderr


@pytest.mark.parametrize("name", TRAINING)
def test_streams_and_experts_divide_over_its_tasks(name):
    asked = directives(name)
    n_tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    run = load_config(preset=name)
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert run.training.batch_size % n_tasks == 0
    assert run.moe.n_experts % n_tasks == 0
    assert (FOLDER / f"{name}.sh").read_text().endswith(f'/slurm/launch.sh" train {name} "$@"\n')


@pytest.mark.parametrize("name", [*TRAINING, "compare_routers", "finetune_sst2"])
def test_what_trains_comes_back(name):
    asked = directives(name)
    assert {"requeue", "signal", "open-mode"} <= asked.keys()
    assert asked["signal"] == "USR1@300"
    assert asked["job-name"] == name
