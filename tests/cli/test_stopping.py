"""Ranks that get signals, die and hang: how the others end, and that the same command goes on."""

import signal
from pathlib import Path
from subprocess import Popen

import pytest

from megamoe.checkpoint.format import step_folder
from tests.checkpoint.runs import differing
from tests.processes import PATIENCE_SECONDS, handles, ranks, wait_until
from tests.run_folders import hidden, repeatable, steps_logged

pytestmark = pytest.mark.distributed

LAST_STEP = 400
TRAIN = (
    "train", "--config", "toy.toml", "--deepspeed_config", "fp32.json", f"training.max_steps={LAST_STEP}",
    "moe.schedule.mode=linear_increase", "moe.schedule.min_k=1", "moe.schedule.max_k=4",
    "optimizer.schedule=plateau", "training.micro_batch_size=1", "evaluation.every=100",
    "checkpoint.every=50", "logging.every=1", "logging.tensorboard=false",
)  # fmt: skip


def end(processes: list[Popen[str]]) -> tuple[list[int], str]:
    """Exit codes, and what all of them said."""
    said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    return [process.returncode for process in processes], "".join(out + err for out, err in said)


@pytest.fixture(scope="module")
def folder(project: Path) -> Path:
    (project / "fp32.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}')
    return project


@pytest.fixture(scope="module")
def uncut(folder: Path) -> Path:
    with ranks(2, *TRAIN, "name=uncut", folder=folder) as processes:
        codes, said = end(processes)
    assert codes == [0, 0], said
    return folder / "runs/uncut"


def test_a_run_stopped_by_signals_goes_on_bit_for_bit(uncut: Path, folder: Path) -> None:
    run = folder / "runs/stopped"
    for times, (rank, numbers) in enumerate(
        [(1, [signal.SIGUSR1]), (0, [signal.SIGTERM, signal.SIGTERM]), (0, [])]
    ):
        before = steps_logged(run)
        with ranks(2, *TRAIN, "name=stopped", folder=folder) as processes:
            if numbers:
                wait_until(lambda before=before: steps_logged(run) >= before + 7, *processes)
            for number in numbers:
                processes[rank].send_signal(number)
            codes, said = end(processes)
        assert "Traceback" not in said, said
        if not numbers:
            assert codes == [0, 0], said
            break
        assert codes == [75, 75], said
        step = steps_logged(run)
        assert before < step < LAST_STEP, f"stop {times} came too late to tell anything"
        assert (run / "checkpoints" / step_folder(step)).is_dir()
        assert f"stopped on {numbers[0].name}; last checkpoint: runs/stopped/checkpoints/step-" in said
        assert "the same command goes on" in said
        assert not hidden(run)
    assert repeatable(run) == repeatable(uncut)
    last = Path("checkpoints") / step_folder(LAST_STEP)
    assert differing(uncut / last, run / last) == []
    assert not hidden(run)
    assert not (run / "heartbeats").exists()


def test_a_signal_before_the_first_step_writes_nothing(folder: Path) -> None:
    with ranks(2, *TRAIN, "name=early", folder=folder) as processes:
        wait_until(lambda: all(handles(process, signal.SIGTERM) for process in processes), *processes)
        processes[1].send_signal(signal.SIGTERM)
        codes, said = end(processes)
    assert codes == [75, 75], said
    assert "stopped on SIGTERM before the first step" in said
    assert not (folder / "runs/early").exists()


def test_the_others_end_when_a_rank_is_killed(folder: Path) -> None:
    run = folder / "runs/killed"
    with ranks(2, *TRAIN, "name=killed", "training.max_steps=1000000", folder=folder) as processes:
        wait_until(lambda: steps_logged(run) > 55, *processes)
        processes[1].kill()
        codes, said = end(processes)
    assert codes == [76, -signal.SIGKILL], said
    assert said.count("megamoe: error: rank 0 lost another rank after step ") == 1, said
    assert "Traceback" not in said


def test_a_rank_that_hangs_is_named(folder: Path) -> None:
    run = folder / "runs/hanging"
    limits = ("training.hang_timeout=8", "training.max_steps=1000000")
    with ranks(2, *TRAIN, "name=hanging", *limits, folder=folder) as processes:
        wait_until(lambda: len(list((run / "heartbeats").glob("rank-*.json"))) == 2, *processes)
        processes[1].send_signal(signal.SIGSTOP)
        _, said = processes[0].communicate(timeout=PATIENCE_SECONDS)
        assert processes[0].returncode == 76, said
    assert "training.hang_timeout = 8: no progress for so many seconds" in said
    assert f"(process {processes[1].pid}): silent, last seen " in said
    assert "waiting after step " in said
    stacks = (run / "heartbeats/rank-00000.stacks").read_text()
    assert "trainer.py" in stacks
