import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

import megamoe
from megamoe.training.environment import (
    config_hash,
    describe_environment,
    environment_table,
    launch_variables,
)
from tests.environment import environment
from tests.processes import PATIENCE_SECONDS
from tests.training.runs import toy_run

WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys(("torch", "deepspeed", "psutil", "numpy")))
from megamoe.cli import main
sys.exit(main(["env", "--json"]))
"""


def test_facts_can_be_written_as_json(tmp_path):
    config = toy_run(tmp_path).to_dict()
    facts = describe_environment(config)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["megamoe"] == megamoe.__version__
    assert facts["packages"]["torch"] == __import__("torch").__version__
    assert facts["packages"]["deepspeed"]
    assert facts["system"]["cores"] >= facts["system"]["usable_cores"] >= 1
    assert facts["system"]["memory_gib"] > 0
    ops = facts["deepspeed_ops"]
    assert "cpu_adam" in ops["built_in"] + ops["compiled_at_first_use"] + ops["not_possible_here"]
    assert facts["devices"]["accelerator"] in ("cpu", "cuda")
    assert facts["config_sha256"] == config_hash(dict(reversed(config.items())))


def test_hash_changes_with_any_option(tmp_path):
    a, b = toy_run(tmp_path).to_dict(), toy_run(tmp_path, model={"dropout": 0.2}).to_dict()
    assert config_hash(a) != config_hash(b)


def test_commit_is_that_of_the_checkout():
    folder = Path(megamoe.__file__).parent
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    tracked = subprocess.run(
        ["git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True
    )
    if tracked.returncode == 0:
        assert describe_environment()["git_commit"].rstrip("+") == head.stdout.strip()
    else:
        assert describe_environment()["git_commit"] is None


def test_what_is_broken_or_missing_is_said_and_the_rest_is_told(tmp_path):
    """Without torch, DeepSpeed and psutil, and with no program to ask: no git, mpirun or srun."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment() | {"PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for name in ("devices", "deepspeed_ops"):
        assert facts[name] == "unknown: ModuleNotFoundError: import of torch halted; None in sys.modules"
    assert facts["system"]["memory_gib"].startswith("unknown: ModuleNotFoundError: import of psutil halted")
    assert facts["packages"]["torch"] == version("torch")
    assert (facts["mpi"]["launcher"], facts["slurm"], facts["git_commit"]) == (None, None, None)


def test_the_launch_is_told_as_it_is_understood_or_refused(monkeypatch):
    ranks = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    monkeypatch.setattr("os.environ", environment() | ranks)
    assert describe_environment()["launched_as"] == {
        "launcher": "Open MPI", "rank": "1 of 8", "local_rank": "1 of 8", "meeting_point": "agreed over MPI",
    }  # fmt: skip
    monkeypatch.setattr("os.environ", environment() | ranks | {"RANK": "0", "WORLD_SIZE": "1"})
    refused = describe_environment()["launched_as"]
    assert refused.startswith("refused: WORLD_SIZE = 1: Open MPI started 8 processes (OMPI_COMM_WORLD_SIZE)")


def test_the_table_shows_values_as_they_are():
    facts = {"launch": {"SLURM_NODELIST": "node[a-c]"}, "gpus": ["one", "two"], "apex": None, "devices": {}}
    output = io.StringIO()
    Console(file=output, width=60).print(environment_table(facts))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines == [["launch", "SLURM_NODELIST", "node[a-c]"], ["gpus", "one,", "two"], ["apex", "none"]]


def test_launch_variables_hold_no_secrets():
    environ = {
        "RANK": "1", "SLURM_JOB_ID": "7", "NCCL_DEBUG": "INFO", "HOME": "/root", "DS_ACCELERATOR": "cpu",
        "SLURM_JWT": "eyJ", "SLURM_JOB_TOKEN": "x", "WANDB_API_KEY": "secret",
    }  # fmt: skip
    expected = {"RANK": "1", "SLURM_JOB_ID": "7", "NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu"}
    assert launch_variables(environ) == expected


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({}, "not installed"),
        ({"apex/__init__.py": ""}, "not NVIDIA Apex: the package installed under this name is another one"),
        (
            {"apex/__init__.py": "", "apex/normalization.py": "FusedLayerNorm = object"},
            "NVIDIA Apex",
        ),
    ],
)
def test_apex_is_told_by_its_modules(tmp_path, modules, expected):
    for name, source in modules.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    code = "from megamoe.training.environment import _apex; print(_apex())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=Path(megamoe.__file__).parents[1],
    )
    assert found.stdout.strip() == expected, found.stderr
