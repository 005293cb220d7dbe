"""What writers make of metrics, without an engine: files, terminal lines, trackers."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamoe.errors import ConfigError
from megamoe.training.callbacks import build_callbacks
from megamoe.training.callbacks.console import ConsoleCallback
from megamoe.training.callbacks.jsonl import JsonlCallback
from megamoe.training.callbacks.results import ResultsCallback
from megamoe.training.callbacks.tensorboard import TensorBoardCallback
from megamoe.training.callbacks.wandb import WandbCallback
from megamoe.training.evaluation import Evaluation
from megamoe.training.metrics_file import drop_after, read_metrics, to_line
from megamoe.training.run_folder import RunFolder
from tests.training.runs import toy_corpus, toy_run

METRICS: dict[str, Any] = {
    "step": 4, "tokens": 96, "train/loss": 2.0, "train/bpc": 2.885, "train/lr": 1e-3, "train/grad_norm": 0.25,
    "train/top_k": 3, "train/skipped_steps": 1, "train/tokens_per_second": 1234.0, "time/eta_seconds": 3725.0,
    "routing/max_over_mean": 1.5, "routing/layer_0/load": [0.5, 0.5],
}  # fmt: skip
VALID = Evaluation("toy text", "valid", "bpc", 93, {2: 1.0, 4: 0.9})
TEST = Evaluation("toy text", "test", "bpc", 93, {2: 1.0, 4: 0.9})


def stand_in(folder: Path, step: int = 4) -> Any:
    """What callbacks read of a trainer."""
    run = toy_run(folder)
    return types.SimpleNamespace(
        run=run, corpus=toy_corpus(), folder=RunFolder(folder), step=step, tokens=24 * step, best_step=step,
        last_checkpoint=folder / "checkpoints/step-000000004",
    )  # fmt: skip


def test_jsonl_drops_what_a_resumed_run_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_line({"step": step}) for step in (2, 4, 6)) + '{"step": 8, "tra')
    callback = JsonlCallback(path)
    callback.on_train_start(stand_in(tmp_path, step=4))
    callback.on_log(stand_in(tmp_path, step=6), {"step": 6, "train/loss": float("nan")})
    callback.on_evaluation(stand_in(tmp_path, step=6), VALID)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:3] == [{"step": 2}, {"step": 4}, {"step": 6, "train/loss": None}]
    assert lines[3] == {"step": 6, "tokens": 144} | VALID.metrics()


def test_a_finished_run_that_is_started_again_keeps_one_line_of_test_figures(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 7, "test/bpc_k2": 2.0},
        {"step": 14, "train/loss": 1.0},
        {"step": 14, "test/bpc_k2": 1.5},
    ]
    path.write_text("".join(map(to_line, lines)))
    drop_after(path, 14, 14)
    assert read_metrics(path) == lines[:2]


def test_metrics_file_may_be_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_after(path, 3, 14)
    assert not path.exists()
    assert read_metrics(path) == []


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    output = io.StringIO()
    console = ConsoleCallback(tmp_path / "train.log", Console(file=output, width=120))
    console.on_log(stand_in(tmp_path), METRICS)
    console.on_evaluation(stand_in(tmp_path), VALID)
    console.on_evaluation(stand_in(tmp_path), TEST)
    lines = output.getvalue().splitlines()
    assert lines[0] == (
        "step  4/14 |  2.8850 bpc | lr 1.00e-03 | grad  0.250 |    1.2k tok/s | k  3 | load 1.50x | skipped 1"
        " | ETA 1:02:05"
    )
    assert lines[1] == "step  4/14 | validation: 1.4427 bpc at k = 2, 1.2984 bpc at k = 4 (best so far)"
    assert "test figures on toy text" in output.getvalue()
    assert (tmp_path / "train.log").read_text() == output.getvalue()


@pytest.mark.parametrize("width", [80, 150])
def test_a_bar_on_a_terminal_and_lines_in_the_log(width, tmp_path):
    output = io.StringIO()
    console = ConsoleCallback(tmp_path / "train.log", Console(file=output, width=width, force_terminal=True))
    console.start_bar(stand_in(tmp_path, step=0))
    console.on_log(stand_in(tmp_path), METRICS)
    console.on_evaluation(stand_in(tmp_path), VALID)
    console.on_evaluation(stand_in(tmp_path), TEST)
    shown = output.getvalue()
    assert "━" in shown
    assert "4/14" in shown
    assert "load 1.50x  ETA 1:02:05" in shown
    assert "…" not in shown
    assert "validation: 1.4427 bpc" in shown
    log = (tmp_path / "train.log").read_text()
    assert log.startswith("step  4/14 |  2.8850 bpc | lr 1.00e-03")
    assert "\x1b" not in log


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_interrupted_run_says_where_it_can_go_on(tmp_path, checkpoint):
    output = io.StringIO()
    console = ConsoleCallback(tmp_path / "train.log", Console(file=output, width=120))
    trainer = stand_in(tmp_path)
    trainer.last_checkpoint = trainer.last_checkpoint if checkpoint else None
    console.on_error(trainer, KeyboardInterrupt())
    expected = (
        f"last checkpoint: {trainer.last_checkpoint}" if checkpoint else "no checkpoint was written yet"
    )
    assert f"step  4/14 | interrupted; {expected}" in output.getvalue()


def test_tensorboard_gets_every_number(tmp_path):
    callback = TensorBoardCallback(tmp_path)
    callback.on_train_start(stand_in(tmp_path, step=0))
    callback.on_log(stand_in(tmp_path), METRICS)
    callback.on_evaluation(stand_in(tmp_path), VALID)
    callback.on_train_end(stand_in(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {name for name in METRICS if "/" in name and not name.endswith("load")} | set(VALID.metrics())
    assert set(events.Tags()["scalars"]) == names
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(4, 2.0)]


def test_wandb_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = toy_run(tmp_path, logging={"wandb": True})
    with pytest.raises(ConfigError, match=r"^logging.wandb = True: wandb is not installed; pip install"):
        build_callbacks(run, RunFolder.of(run), is_main=True)
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    opened, logged = [], []

    class Session:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

        def finish(self, exit_code: int = 0) -> None:
            logged.append(("finish", exit_code))

    def init(**settings: Any) -> Session:
        opened.append(settings)
        return Session()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (0, 4):
        callback = WandbCallback("project")
        callback.on_train_start(stand_in(tmp_path, step=step))
    callback.on_log(stand_in(tmp_path), METRICS)
    callback.on_evaluation(stand_in(tmp_path), VALID)
    callback.on_error(stand_in(tmp_path), RuntimeError())
    assert opened[0] == opened[1]
    assert opened[0]["resume"] == "allow"
    assert opened[0]["config"] == toy_run(tmp_path).to_dict()
    assert logged == [(4, METRICS), (4, VALID.metrics()), ("finish", 1)]


@pytest.mark.parametrize(("best_step", "weights"), [(4, "best"), (None, "checkpoints/step-000000004")])
def test_the_end_names_weights_that_exist(tmp_path, best_step, weights):
    terminal = io.StringIO()
    console = ConsoleCallback(tmp_path / "train.log", Console(file=terminal, width=200))
    trainer = stand_in(tmp_path)
    trainer.best_step = best_step
    ResultsCallback(console).on_train_end(trainer)
    shown = terminal.getvalue()
    assert f"evaluate {tmp_path / weights} " in shown
    assert ("lowest validation loss" in shown) == (best_step is not None)
    assert "--logdir" not in shown  # the toy run writes no events
    assert (tmp_path / "plots/curves.png").exists()


def test_only_the_main_rank_writes(tmp_path):
    run = toy_run(tmp_path)
    shared = {type(callback) for callback in build_callbacks(run, RunFolder.of(run), is_main=False)}
    main = {type(callback) for callback in build_callbacks(run, RunFolder.of(run), is_main=True)}
    assert {cls.__name__ for cls in shared} == {"HealthCallback", "CheckpointCallback"}
    assert {cls.__name__ for cls in main - shared} == {"ConsoleCallback", "JsonlCallback", "ResultsCallback"}
