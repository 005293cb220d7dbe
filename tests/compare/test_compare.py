"""megamoe compare from the command line, on real text: cut, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megamoe.training.metrics_file import read_metrics

COMMAND = [
    sys.executable, "-m", "megamoe", "compare", "--preset", "tiny_enwik8", "--routers", "hyper,switch",
    "--seeds", "2", "--jobs", "2", "training.max_steps=30", "evaluation.every=10", "logging.every=5",
    "evaluation.max_tokens=500", "evaluation.top_ks=2,4", "logging.tensorboard=false", "model.d_model=32",
    "moe.d_expert=16", "model.d_head=8", "checkpoint.every=10",
]  # fmt: skip
NAMES = ["hyper-seed1111", "hyper-seed1112", "switch-seed1111", "switch-seed1112"]


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, *more], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uncut")
    process = start(folder)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return folder / "runs/compare_tiny_enwik8", out


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return values


def figures(folder: Path) -> dict[str, Any]:
    return {entry["label"]: entry["figures"] for entry in summary(folder)["contestants"]}


def test_everything_is_written(uncut: tuple[Path, str]) -> None:
    folder, out = uncut
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == NAMES
    found = summary(folder)
    assert [entry["label"] for entry in found["contestants"]] == ["hyper", "switch"]
    for entry in found["contestants"]:
        for place, run in enumerate(entry["runs"]):
            results = json.loads((folder / f"{entry['label']}-seed{run['seed']}/results.json").read_text())
            assert run["figures"] == results["bpc_by_k"]
            assert all(entry["figures"][k]["seeds"][place] == value for k, value in run["figures"].items())
        assert 0 < entry["routing"]["agreement"] < 1
        assert entry["tokens_per_second"] > 0
    assert set(found["contestants"][0]["figures"]) == {"2", "4"}
    assert set(found["contestants"][1]["figures"]) == {"1"}
    assert (folder / "figures.png").stat().st_size > 10_000
    assert (folder / "routing.png").stat().st_size > 10_000
    assert "hyper" in out
    assert "told apart" in " ".join((folder / "compare.md").read_text().split())


def test_all_see_the_same_data(uncut: tuple[Path, str]) -> None:
    folder, _ = uncut
    seen = [[line["tokens"] for line in read_metrics(folder / name / "metrics.jsonl")] for name in NAMES]
    assert all(tokens == seen[0] for tokens in seen)
    configs = [json.loads((folder / name / "config.json").read_text()) for name in NAMES]
    for config in configs:
        config.pop("name")
        config["training"].pop("seed")
        config["moe"].pop("router")
    assert all(config == configs[0] for config in configs)


def test_a_cut_comparison_goes_on_to_the_same_figures(uncut: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path)
    folder = tmp_path / "runs/compare_tiny_enwik8"
    deadline = time.monotonic() + 200
    while not any(read_metrics(folder / name / "metrics.jsonl") for name in NAMES):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert "the same command goes on" in err
    assert not (folder / "compare.json").exists()
    process = start(tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert figures(folder) == figures(uncut[0])
    stamps = {name: (folder / name / "results.json").stat().st_mtime_ns for name in NAMES}
    again = start(tmp_path)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert stamps == {name: (folder / name / "results.json").stat().st_mtime_ns for name in NAMES}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds = 0: give a number above 0"),
        (["--routers", "hyper,swich"], "moe.router.name = 'swich': unknown policy, did you mean 'switch'?"),
        (["moe.router.drop=0.1"], "moe.router: is what --routers compares"),
        (["moe.top_k=99"], "moe.top_k = 99"),
        (["--deepspeed_config", "missing.json"], "missing.json"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    tmp_path: Path, more: list[str], message: str
) -> None:
    process = start(tmp_path, *more)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.startswith("megamoe: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_another_config_in_the_same_folder_is_refused(uncut: tuple[Path, str]) -> None:
    process = start(uncut[0].parents[1], "optimizer.lr=0.5")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "optimizer.lr = 0.5: runs/compare_tiny_enwik8/hyper-seed1111 holds a run with 0.003" in err
