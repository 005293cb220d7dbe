"""Runs commands as a user does, and one small training run for all tests of this folder."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from tests.environment import environment
from tests.launchers import require_mpirun
from tests.processes import PATIENCE_SECONDS, free_port, ranks

CONFIG = """
name = "toy"
[data]
dataset = "text"
path = "data"
[model]
n_layers = 2
d_model = 16
n_heads = 2
d_head = 8
dropout = 0.0
segment_len = 16
memory_len = 16
[moe]
n_experts = 4
d_expert = 8
top_k = 2
router.name = "hyper"
router.hyper_size = 8
[training]
batch_size = 4
max_steps = 6
[evaluation]
every = 3
batch_size = 4
segment_len = 16
[checkpoint]
every = 3
[logging]
every = 2
"""


@dataclass(frozen=True)
class Done:
    code: int
    output: str
    errors: str


def call(command: Sequence[str], folder: Path) -> Done:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_two_ranks(launcher: str, *arguments: str, folder: Path) -> Done:
    """``megamoe ARGUMENTS`` on two ranks, started by "deepspeed", "torchrun", "mpirun" or "by hand"."""
    if launcher == "by hand":
        return _by_hand(*arguments, folder=folder)
    if launcher == "mpirun":
        return call([*require_mpirun(), "-n", "2", sys.executable, "-m", "megamoe", *arguments], folder)
    count = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}[launcher]
    port = str(free_port())
    return call([launcher, count, "2", "--master_port", port, "--module", "megamoe", *arguments], folder)


def _by_hand(*arguments: str, folder: Path) -> Done:
    """The code is that of the first rank that fails."""
    with ranks(2, *arguments, folder=folder) as processes:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    codes = [process.returncode for process in processes]
    return Done(next(filter(None, codes), 0), *("".join(texts) for texts in zip(*outputs, strict=True)))


def megamoe(*arguments: str, folder: Path) -> Done:
    return call([sys.executable, "-m", "megamoe", *arguments], folder)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``toy.toml`` and a prepared text in ``data``."""
    folder = tmp_path_factory.mktemp("project")
    text = folder / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 150)
    prepare(open_text([text], "the fox", by_lines=False), folder / "data", "bytes")
    (folder / "toy.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def launched(project: Path) -> Done:
    """The toy run on two ranks, by the deepspeed launcher."""
    (project / "fp32.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}')
    done = on_two_ranks(
        "deepspeed", "train", "--config", "toy.toml", "--deepspeed_config", "fp32.json", folder=project
    )
    assert done.code == 0, done.errors
    return done
