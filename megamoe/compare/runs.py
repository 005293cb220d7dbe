"""Training the runs of a comparison in processes of their own, some at a time; finished ones are left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError, ExitCode, StoppedError
from megamoe.training.metrics_file import read_metrics
from megamoe.training.run_folder import RunFolder, write_json

POLL_SECONDS = 1.0
DIVERGED = "diverged"


@dataclass
class _Running:
    """A run in its process."""

    run: RunConfig
    process: subprocess.Popen[bytes]
    steps_told: int = 0

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.run)


@dataclass
class Pool:
    """How runs are trained.

    Attributes:
        jobs: runs at a time.
        ranks: processes of each run, by torchrun if more than one.
        ds_config: a DeepSpeed config file, or nothing.
    """

    jobs: int = 1
    ranks: int = 1
    ds_config: str = ""
    _running: list[_Running] = field(default_factory=list)

    def train(self, runs: Sequence[RunConfig]) -> None:
        """Train all that are not finished, in the given order.

        Raises:
            ConfigError: a run was refused, or failed; its last line says why. The others were stopped.
            StoppedError: a signal asked for it; every run in progress has saved.
        """
        waiting = [run for run in runs if not is_finished(run)]
        total = sum(run.training.max_steps for run in runs)
        done = total - sum(run.training.max_steps for run in waiting)
        with (
            tqdm(total=total, initial=done, unit="step", disable=not sys.stderr.isatty()) as bar,
            _signals() as asked,
        ):
            bar.set_description(f"{len(runs) - len(waiting)}/{len(runs)} runs")
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self.jobs and not asked:
                        self._running.append(self._start(waiting.pop(0)))
                    time.sleep(POLL_SECONDS)
                    for running in list(self._running):
                        self._look(running, bar)
                    finished = len(runs) - len(waiting) - len(self._running)
                    bar.set_description(f"{finished}/{len(runs)} runs")
                    if asked:
                        raise StoppedError(f"stopped on {signal.Signals(asked[0]).name}, all runs have saved")
            finally:
                self._stop()

    def _start(self, run: RunConfig) -> _Running:
        folder = RunFolder.of(run).root
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "compare.json"
        write_json(config, run.to_dict())
        command = [*self._launcher(), "-m", "megamoe", "train", "--config", str(config)]
        if self.ds_config:
            command += ["--deepspeed_config", self.ds_config]
        with (folder / "output.log").open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        return _Running(run, process)

    def _launcher(self) -> list[str]:
        if self.ranks == 1:
            return [sys.executable]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc_per_node", str(self.ranks), "--no-python", sys.executable]

    def _look(self, running: _Running, bar: "tqdm[Any]") -> None:
        code = running.process.poll()
        lines = read_metrics(running.folder.metrics)
        steps = max((line["step"] for line in lines), default=0)
        bar.update(steps - running.steps_told)
        running.steps_told = steps
        if code is None:
            return
        self._running.remove(running)
        if code == ExitCode.DONE:
            _tell(f"{running.run.name}: done", bar)
        elif _has_diverged(running):
            write_json(running.folder.root / DIVERGED, {"steps": steps})
            _tell(f"{running.run.name}: diverged after {steps:,} steps, and is counted so", bar)
        elif code != ExitCode.STOPPED:
            raise ConfigError(f"run {running.run.name!r} failed: {_last_line(running)}")

    def _stop(self) -> None:
        """Ask what still runs to save and end."""
        for running in self._running:
            os.killpg(running.process.pid, signal.SIGTERM)
        for running in self._running:
            running.process.wait()
        self._running.clear()


def is_finished(run: RunConfig) -> bool:
    """Whether a run was trained and scored with this very config, or has diverged.

    Raises:
        ConfigError: its folder holds a run of another config.
    """
    folder = RunFolder.of(run)
    if folder.config.exists():
        found = json.loads(folder.config.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(run.to_dict()))
        for section, values in wanted.items():
            if section in ("model", "moe", "optimizer", "training") and found.get(section) != values:
                name = next(key for key in values if found.get(section, {}).get(key) != values[key])
                raise ConfigError(
                    f"{section}.{name} = {values[name]!r}: {folder.root} holds a run with"
                    f" {found.get(section, {}).get(name)!r}; give another name, or remove it"
                )
    return (folder.root / DIVERGED).exists() or folder.is_scored(run.training.max_steps)


def _has_diverged(running: _Running) -> bool:
    return "training.max_skipped_steps" in _last_line(running) or "spike_factor" in _last_line(running)


def _last_line(running: _Running) -> str:
    lines = (running.folder.root / "output.log").read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line for line in lines if line.startswith("megamoe: error:")] or [line for line in lines if line]
    return said[-1].removeprefix("megamoe: error: ") if said else "it said nothing"


def _tell(line: str, bar: "tqdm[Any]") -> None:
    bar.clear()
    print(line, file=sys.stderr, flush=True)
    bar.refresh()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that asked to stop, as they come."""
    asked: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {name: signal.signal(name, lambda number, frame: asked.append(number)) for name in names}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def folder_of(base: RunConfig) -> Path:
    """Where a comparison lies: its runs, compare.json, compare.md and images."""
    return RunFolder.of(base).root
