import json
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe
from megamoe.training.environment import config_hash, describe_environment, launch_variables
from tests.training.runs import toy_run


def test_facts_can_be_written_as_json(tmp_path):
    config = toy_run(tmp_path).to_dict()
    facts = describe_environment(config)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["megamoe"] == megamoe.__version__
    assert facts["packages"]["torch"] == __import__("torch").__version__
    assert facts["packages"]["deepspeed"]
    assert facts["devices"]["cores"] >= 1
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
