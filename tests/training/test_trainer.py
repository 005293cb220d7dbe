"""The trainer on one and two ranks: exact resume, what a run leaves behind, and its guard."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.reader import find_latest
from megamoe.checkpoint.shard import Slice
from megamoe.checkpoint.staging import Staging
from megamoe.errors import DivergenceError
from megamoe.parallel.launch import World, read_launch, start
from megamoe.training.callbacks import Callback, StepRecord
from megamoe.training.metrics_file import read_metrics
from megamoe.training.trainer import Trainer
from tests.checkpoint.runs import differing
from tests.ranks import run_ranks
from tests.run_folders import repeatable
from tests.training.runs import BF16, FP32, Recorder, build_trainer, toy_run, train_toy

COPY = Staging.copy
PRECISIONS = {"fp32": FP32, "bf16": BF16}
LAST_STEP = 14


def resume_twice(world: World, folder: Path, precision: str) -> dict[str, Any]:
    """An uncut run, and one cut inside the first epoch and again inside the second."""
    ds = PRECISIONS[precision]
    updates = {
        "training": {"micro_batch_size": 2 // world.world_size},
        "checkpoint": {"async_write": precision == "fp32"},
    }
    uncut = train_toy(toy_run(folder, name="uncut", **updates), ds, world)
    cut = toy_run(folder, name="cut", **updates)
    pieces = [
        train_toy(cut, ds, world, cut_after=7),
        train_toy(cut, ds, world, cut_after=13, resume=find_latest(folder / "cut")),
        train_toy(cut, ds, world, resume=find_latest(folder / "cut")),
    ]
    return {
        "uncut": uncut.steps,
        "pieces": [piece.steps for piece in pieces],
        "uncut evaluations": [(step, asdict(evaluation)) for step, evaluation in uncut.evaluations],
        "evaluations": [
            (step, asdict(evaluation)) for piece in pieces for step, evaluation in piece.evaluations
        ],
    }


class Disturb(Callback):
    """Sets one output bias of one rank's model after a step."""

    def __init__(self, rank: int, step: int, value: float) -> None:
        self.rank, self.step, self.value = rank, step, value

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.step == self.step and trainer.world.rank == self.rank:
            with torch.no_grad():
                trainer.engine.model.output.biases[0][0] = self.value


def stopped_by_guard(
    world: World, folder: Path, name: str, ds: Any, disturb: Disturb, **training: Any
) -> dict[str, Any]:
    quiet = {"evaluation": {"every": 0}, "checkpoint": {"every": 0}, "logging": {"every": 100}}
    run = toy_run(folder, name=name, training={"max_steps": 40, "max_skipped_steps": 3} | training, **quiet)
    recorder = Recorder()
    trainer = build_trainer(run, ds, world, [disturb, recorder])
    with pytest.raises(DivergenceError) as error:
        trainer.train()
    return {
        "message": str(error.value),
        "step": trainer.step,
        "told": [type(e).__name__ for e in recorder.errors],
    }


def copy_late(staging: Staging, slices: Sequence[Slice]) -> list[Slice]:
    """`Staging.copy`, not begun before a step of training would be over."""
    time.sleep(0.2)
    return COPY(staging, slices)


def run_everything(folder: str) -> dict[str, Any]:
    world = start(read_launch())
    Staging.copy = copy_late
    results: dict[str, Any] = {
        precision: resume_twice(world, Path(folder) / precision, precision) for precision in PRECISIONS
    }
    for best_k in ("auto", 2):
        evaluation = {"best_k": best_k, "top_ks": [1]}
        moe = {"top_k": 1, "schedule": {"mode": "constant"}}
        train_toy(toy_run(Path(folder), name=f"best_{best_k}", moe=moe, evaluation=evaluation), FP32, world)
    last = world.world_size - 1
    results["nan"] = stopped_by_guard(world, Path(folder), "nan", FP32, Disturb(last, 2, math.nan))
    results["spike"] = stopped_by_guard(
        world, Path(folder), "spike", FP32, Disturb(last, 24, 1e3), spike_factor=1.5
    )  # fmt: skip
    return results


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(run_everything, request.param, str(folder))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_repeats_the_uncut_one_bit_for_bit(trained, precision):
    folder, ranks = trained
    for rank in ranks:
        result = rank[precision]
        uncut = {step["step"]: step for step in result["uncut"]}
        assert list(uncut) == list(range(1, LAST_STEP + 1))
        first, second, third = result["pieces"]
        assert [piece[0]["step"] for piece in (first, second, third)] == [1, 6, 11]
        for piece in (first, second, third):
            assert piece == [uncut[step["step"]] for step in piece]
        assert dict(result["evaluations"]) == dict(result["uncut evaluations"])
    assert len({step["top_k"] for step in result["uncut"]}) == 4
    assert (
        differing(
            *(folder / precision / run / "checkpoints" / step_folder(LAST_STEP) for run in ("uncut", "cut"))
        )
        == []
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_metrics_of_a_resumed_run_are_those_of_the_uncut_one(trained, precision):
    folder, _ = trained
    uncut, cut = (repeatable(folder / precision / run) for run in ("uncut", "cut"))
    assert cut == uncut
    assert [line["step"] for line in cut if "train/loss" in line] == list(range(1, LAST_STEP + 1))
    assert [line["step"] for line in cut if "valid/loss_k4" in line] == list(range(2, LAST_STEP + 1, 2))


def test_metrics_are_named_and_complete(trained):
    folder, ranks = trained
    lines = read_metrics(folder / "fp32/uncut/metrics.jsonl")
    logged = [line for line in lines if "train/loss" in line]
    for line in logged:
        assert all(name in ("step", "tokens") or "/" in name for name in line)
        assert line["train/bpc"] == pytest.approx(line["train/loss"] / math.log(2))
        assert sum(line["routing/layer_1/load"]) == pytest.approx(1)
        assert len(line["routing/layer_0/load"]) == 4
    churn = [line["routing/layer_0/churn"] for line in logged]
    assert churn[0] is None
    assert all(0 <= value <= 1 for value in churn[1:])
    # The mean over ranks is the loss of the global batch.
    losses = zip(*([step["loss"] for step in rank["fp32"]["uncut"]] for rank in ranks), strict=True)
    assert [line["train/loss"] for line in logged] == pytest.approx(
        [sum(rank) / len(rank) for rank in losses]
    )
    # Eleven segments of six to an epoch, the last of three.
    assert [line["tokens"] for line in logged][9:13] == [4 * n for n in (60, 63, 69, 75)]


def test_what_a_run_leaves_behind(trained):
    folder, _ = trained
    root = folder / "fp32/uncut"
    assert {path.name for path in root.iterdir()} == {
        "metrics.jsonl", "train.log", "results.json", "checkpoints", "best", "plots",
    }  # fmt: skip
    assert [path.name for path in sorted((root / "checkpoints").iterdir())] == [
        step_folder(10),
        step_folder(14),
    ]
    results = json.loads((root / "results.json").read_text())
    assert (results["corpus"], results["split"], results["metric"]) == ("toy text", "test", "bpc")
    assert set(results["bpc_by_k"]) == {"1", "2", "4"}
    log = (root / "train.log").read_text()
    assert "step  8/14 | validation:" in log
    assert "test figures on toy text" in log


def test_best_is_the_lowest_validation_loss_at_all_experts(trained):
    folder, _ = trained
    lines = read_metrics(folder / "fp32/uncut/metrics.jsonl")
    scored = {line["step"]: line["valid/loss_k4"] for line in lines if "valid/loss_k4" in line}
    state = json.loads((folder / "fp32/uncut/best/state.json").read_text())
    assert state["step"] == min(scored, key=scored.__getitem__)
    assert json.loads((folder / "fp32/uncut/results.json").read_text())["best_step"] == state["step"]


@pytest.mark.parametrize(("best_k", "scored_k"), [("auto", 1), (2, 2)])
def test_a_constant_k_and_the_option_decide_what_is_best(trained, best_k, scored_k):
    folder, _ = trained
    lines = read_metrics(folder / f"best_{best_k}/metrics.jsonl")
    scored = {line["step"]: line[f"valid/bpc_k{scored_k}"] for line in lines if "valid/loss_k4" in line}
    state = json.loads((folder / f"best_{best_k}/best/state.json").read_text())
    assert (state["step"], state["best_metric"]) == min(scored.items(), key=lambda found: found[1])


def test_plateau_lowers_the_rate(trained):
    _, ranks = trained
    rates = [step["lr"] for step in ranks[0]["fp32"]["uncut"]]
    assert rates[:4] == pytest.approx([0, 5e-2 / 3, 1e-1 / 3, 5e-2])
    assert rates[-1] < 5e-2


def test_guard_stops_when_updates_are_skipped_in_a_row(trained):
    _, ranks = trained
    for rank in ranks:
        assert rank["nan"]["step"] == 5
        assert rank["nan"]["told"] == ["DivergenceError"]
        message = rank["nan"]["message"]
        assert message.startswith("training.max_skipped_steps = 3: ")
        assert "(step 5, loss" in message
        assert "load of each mixture layer: " in message
        assert "\n" not in message


def test_guard_stops_at_a_spike(trained):
    _, ranks = trained
    for rank in ranks:
        assert rank["spike"]["step"] == 25
        assert "exceeds that many times its running mean" in rank["spike"]["message"]
