"""A run through real launchers: two ranks, its folder, going on with it, scoring it, interrupting it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.training.metrics_file import read_metrics
from tests.cli.conftest import CONFIG, Done, call, megamoe, on_two_ranks
from tests.environment import environment
from tests.launchers import require_mpirun

pytestmark = pytest.mark.distributed


def test_a_run_by_the_deepspeed_launcher(launched: Done, project: Path) -> None:
    for shown in (
        "expert-parallel size 2 (2 experts of a layer on each rank)",
        "64 tokens per step",
        "step 6/6 | validation: ",
        "test figures on the fox (true bytes)",
        "next: megamoe evaluate runs/toy/best",
    ):
        assert launched.output.count(shown) == 1, shown
    folder = project / "runs/toy"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "ds_config.json", "environment.json", "metrics.jsonl", "train.log", "results.json",
        "checkpoints", "best", "plots", "tensorboard", ".lock",
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["model"]["vocab_size"] == 256
    assert '"auto"' not in (folder / "ds_config.json").read_text()
    recorded = json.loads((folder / "environment.json").read_text())
    assert (recorded["launch"]["WORLD_SIZE"], recorded["launch"]["LOCAL_RANK"]) == ("2", "0")
    assert (recorded["launched_as"]["launcher"], recorded["launched_as"]["rank"]) == ("deepspeed", "0 of 2")
    assert (folder / "plots/curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())


def test_scoring_the_checkpoint_gives_the_figures_of_the_run(launched: Done, project: Path) -> None:
    reported = json.loads((project / "runs/toy/results.json").read_text())
    scored = megamoe("evaluate", "runs/toy/best", "--json", folder=project)
    assert scored.code == 0, scored.errors
    figures = json.loads(scored.output)
    assert figures["loss_by_k"] == pytest.approx(reported["loss_by_k"], abs=1e-5)
    assert {key: figures[key] for key in ("corpus", "split", "metric", "tokens")} == {
        key: reported[key] for key in ("corpus", "split", "metric", "tokens")
    }


def test_torchrun_goes_on_where_deepspeed_stopped(launched: Done, project: Path) -> None:
    before = (project / "runs/toy/metrics.jsonl").read_text().splitlines()
    done = on_two_ranks(
        "torchrun", "train", "--config", "toy.toml", "--deepspeed_config", "fp32.json",
        "training.max_steps=8", folder=project,
    )  # fmt: skip
    assert done.code == 0, done.errors
    assert "(resuming at step 6, 8 steps)" in done.output
    lines = read_metrics(project / "runs/toy/metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8]
    assert lines[: len(before)] == [json.loads(line) for line in before]


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "by hand", "one process"])
def test_every_launcher_trains_the_same_model(launcher: str, launched: Done, project: Path) -> None:
    """Step for step: bit-equal on the same number of ranks, within rounding in one process."""
    name = launcher.replace(" ", "-")
    arguments = ("train", "--config", "toy.toml", "--deepspeed_config", "fp32.json", f"name={name}")
    one = launcher == "one process"
    done = megamoe(*arguments, folder=project) if one else on_two_ranks(launcher, *arguments, folder=project)
    assert done.code == 0, done.errors
    # The run that `launched` made may have gone on since.
    expected = [line for line in read_metrics(project / "runs/toy/metrics.jsonl") if line["step"] <= 6]
    found = read_metrics(project / f"runs/{name}/metrics.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, other in zip(found, expected, strict=True):
        for figure in ("train/loss", "train/grad_norm", "valid/loss_k2"):
            assert mine.get(figure) == pytest.approx(other.get(figure), abs=1e-5 if one else 0), figure


def test_every_rank_refuses_and_one_tells(launched: Done, project: Path) -> None:
    refused = on_two_ranks(
        "deepspeed", "train", "--config", "toy.toml", "name=refused", "data.path=missing", folder=project
    )
    assert refused.code == 2
    assert (refused.output + refused.errors).count("megamoe: error: data.path = 'missing': ") == 1
    assert "Traceback" not in refused.errors
    assert not (project / "runs/refused").exists()


def test_variables_left_over_in_a_shell_are_refused_in_one_line(project: Path) -> None:
    """mpirun's rank 1 agrees with them and would wait for a rank 0 that has refused."""
    left_over = [word for name in ("RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1") for word in ("-x", name)]
    done = call(
        [*require_mpirun(), "-n", "2", *left_over, sys.executable, "-m", "megamoe", "train", "--config",
         "toy.toml", "name=refused"],
        project,
    )  # fmt: skip
    assert done.code == 2, done.errors
    assert [line for line in done.errors.splitlines() if line.startswith("megamoe:")] == [
        "megamoe: error: RANK = 1: Open MPI counts this process as 0 (OMPI_COMM_WORLD_RANK); unset RANK and"
        " WORLD_SIZE, which may be left over in this shell"
    ]
    assert not (project / "runs/refused").exists()


def test_env_tells_the_hash_that_the_run_recorded(
    launched: Done, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((project / "runs/toy/environment.json").read_text())
    assert main(["env", "--config", str(project / "runs/toy/config.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config_sha256"] == recorded["config_sha256"]


def test_ctrl_c_says_where_the_run_can_go_on(tmp_path: Path, project: Path) -> None:
    (tmp_path / "toy.toml").write_text(CONFIG)
    (tmp_path / "data").symlink_to(project / "data")
    process = subprocess.Popen(
        [sys.executable, "-m", "megamoe", "train", "--config", "toy.toml", "training.max_steps=1000000",
         "logging.tensorboard=false"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/toy/checkpoints/step-000000003").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; last checkpoint: runs/toy/checkpoints/step-" in output
    assert "the same command goes on from there" in output
    assert "Traceback" not in errors
