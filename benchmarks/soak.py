"""A run of two ranks on the CPU that loses a rank again and again, and each time goes on by the same command.

A rank that a seeded choice names gets SIGKILL at a moment that it names too: between two steps of training,
in the middle of writing a checkpoint, or while the run resumes. What must hold, against the same run without
a kill:

- the other rank ends by itself, with exit code 76, within a minute;
- every launch goes on from the newest complete checkpoint, whose hashes are right;
- no more than `checkpoint.every` steps are done again, and those done while a checkpoint was being written;
- the disk never holds more than the checkpoints that are kept, the best, and one of each on its way;
- in the end metrics, test figures, weights, moments and the best checkpoint are equal bit for bit, and no
  temporary file is left.

Exit code 0 if all of it did.

    python -m benchmarks.soak --kills 20 --output benchmarks/results/2026-11-26-soak
"""

import argparse
import json
import os
import platform
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from signal import SIGKILL
from subprocess import Popen, TimeoutExpired
from typing import Any

import torch

from benchmarks.record import add_output, keep
from megamoe.checkpoint.folder import temporary
from megamoe.checkpoint.format import step_folder, step_folders
from megamoe.checkpoint.reader import CheckpointReader, find_latest
from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.errors import CheckpointError, ExitCode
from tests.checkpoint.runs import differing
from tests.processes import PATIENCE_SECONDS, ranks
from tests.run_folders import hidden, repeatable, steps_logged

EVERY = 10
KEEP_LAST = 2
SURVIVOR_SECONDS = 60.0
SMALL_FILES = 5_000_000
# Experts are cheap to train and large to save: writing takes as long as several steps.
CONFIG = f"""
[data]
dataset = "text"
path = "data"
[model]
n_layers = 2
d_model = 64
n_heads = 2
d_head = 32
dropout = 0.1
segment_len = 16
memory_len = 16
[moe]
n_experts = 32
d_expert = 512
top_k = 1
[training]
batch_size = 4
[evaluation]
every = {EVERY}
batch_size = 4
segment_len = 32
max_tokens = 256
top_ks = [1, 32]
[checkpoint]
every = {EVERY}
keep_last = {KEEP_LAST}
[logging]
every = 1
tensorboard = false
"""
DS_CONFIG = {"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}


Ranks = Sequence[Popen[str]]


@dataclass(frozen=True)
class Plan:
    """One kill.

    Attributes:
        rank: who dies.
        moment: "training": so many steps after the checkpoint that the run went on from; "writing": when that
            part of the next checkpoint is in its file; "resuming": that part of a second after the run folder
            was taken.
    """

    rank: int
    moment: str
    steps: int
    part: float


@dataclass(frozen=True)
class Kill:
    """What came of a plan.

    Attributes:
        rank: who died.
        moment: as planned.
        before: the newest complete checkpoint's step at the launch.
        logged: the last step logged then, by the launch before.
        resumed: the step that the run went on from; None if it died before.
        step: the last one logged when everybody had ended.
        torn: step of the checkpoint that was being written then; None: none was.
        left: temporary files then.
        newest: the newest complete checkpoint's step then; -1: one is not what its hashes say.
        code: exit code of the survivor.
        seconds: from the kill to its end.
    """

    rank: int
    moment: str
    before: int
    logged: int
    resumed: int | None
    step: int
    torn: int | None
    left: list[str]
    newest: int
    code: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps to be done again."""
        return self.step - self.newest

    @property
    def problems(self) -> list[str]:
        """What should not be."""
        allowed = EVERY + (0 if self.torn is None else self.step - self.torn)
        if self.step == self.logged:  # killed before the first step: what is lost, the launch before has lost
            allowed = self.lost
        checks = {
            f"the other ended with {self.code}": self.code == ExitCode.LOST_RANK,
            f"the other took {self.seconds:.0f} s": self.seconds < SURVIVOR_SECONDS,
            f"went on from {self.resumed}, not from {self.before}": self.resumed in (None, self.before),
            "the newest checkpoint is damaged": self.newest >= 0,
            f"{self.lost} steps are lost, and {allowed} may be": self.lost <= allowed,
        }
        return [problem for problem, right in checks.items() if not right]

    def __str__(self) -> str:
        torn = "" if self.torn is None else f", checkpoint {self.torn} half written"
        line = (
            f"rank {self.rank} killed while {self.moment}, after step {self.step}{torn}:"
            f" the other ended with {self.code} in {self.seconds:.1f} s, {self.lost} steps to do again"
        )
        return " | ".join([line, *self.problems])


def choose(seed: int, n_kills: int) -> list[Plan]:
    """A third while writing, a fifth while resuming, which the first cannot be, the rest in training."""
    rng = random.Random(seed)
    moments = ["writing"] * max(1, n_kills // 3) + ["resuming"] * -(-n_kills // 5)
    moments += ["training"] * (n_kills - len(moments))
    rng.shuffle(moments)
    while moments[0] == "resuming":
        rng.shuffle(moments)
    return [Plan(rng.randrange(2), moment, rng.randrange(1, 2 * EVERY), rng.random()) for moment in moments]


class Soak:
    """The run that is killed and the one that is not, below `folder`."""

    def __init__(self, folder: Path, n_kills: int) -> None:
        self.folder = folder
        self.uncut, self.run = folder / "runs/uncut", folder / "runs/soak"
        # No kill comes later than two intervals after what is kept, so that the run outlives them all.
        self.max_steps = EVERY * (2 * n_kills + 3)
        self.checkpoint_bytes = self.peak_bytes = self._log_start = 0
        text = folder / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 150)
        prepare(open_text([text], "the fox", by_lines=False), folder / "data", "bytes")
        (folder / "run.toml").write_text(CONFIG)
        (folder / "ds.json").write_text(json.dumps(DS_CONFIG))

    @property
    def most_bytes(self) -> int:
        """What the disk may hold: checkpoints kept, the best, one of each on its way, and small files."""
        return (KEEP_LAST + 1 + 2) * self.checkpoint_bytes + SMALL_FILES

    def finish(self, run: Path) -> None:
        """Launch `run` and wait for its end."""
        with self._launch(run) as processes:
            said = [self._end(process) for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == [0, 0], f"{run.name} ended with {codes}: {' '.join(said)}"
        self.checkpoint_bytes = size_of(run / "checkpoints" / step_folder(self.max_steps))

    def kill(self, plan: Plan) -> Kill:
        """Launch, kill a rank, wait for the other."""
        before, logged = self._newest(), steps_logged(self.run)
        with self._launch(self.run) as processes:
            self._wait_for(plan, processes)
            victim, survivor = processes[plan.rank], processes[1 - plan.rank]
            victim.kill()
            begin = time.monotonic()
            self._end(survivor)
            seconds = time.monotonic() - begin
            said = self._end(victim)
        assert victim.returncode == -SIGKILL, f"rank {plan.rank} ended before it was killed: {said}"
        return Kill(
            rank=plan.rank, moment=plan.moment, before=before, logged=logged, resumed=self._resumed(),
            step=steps_logged(self.run), torn=self._being_written(), left=hidden(self.run),
            newest=self._newest(), code=survivor.returncode, seconds=round(seconds, 2),
        )  # fmt: skip

    def problems(self) -> list[str]:
        """What differs between the two runs, and what is left."""
        last = Path("checkpoints", step_folder(self.max_steps))
        checks = {
            "metrics differ": repeatable(self.uncut) == repeatable(self.run),
            "last checkpoints differ": not differing(self.uncut / last, self.run / last),
            "best checkpoints differ": not differing(self.uncut / "best", self.run / "best"),
            f"left: {hidden(self.run)}": not hidden(self.run),
            "heartbeats are left": not (self.run / "heartbeats").exists(),
            "too many checkpoints": len(step_folders(self.run / "checkpoints")) <= KEEP_LAST,
            f"the disk held {self.peak_bytes} bytes": self.peak_bytes <= self.most_bytes,
        }
        return [problem for problem, right in checks.items() if not right]

    def _launch(self, run: Path) -> Any:
        log = run / "train.log"
        self._log_start = log.stat().st_size if log.exists() else 0
        return ranks(
            2, "train", "--config", "run.toml", "--deepspeed_config", "ds.json", f"name={run.name}",
            f"training.max_steps={self.max_steps}", folder=self.folder,
        )  # fmt: skip

    def _wait_for(self, plan: Plan, processes: Ranks) -> None:
        if plan.moment == "resuming":
            holder = f"process {processes[0].pid} on "
            self._wait(lambda: (self.run / ".lock").read_text().startswith(holder), processes)
            time.sleep(plan.part)
            return
        self._wait(lambda: self._resumed() is not None, processes)
        if plan.moment == "writing":
            enough = 0.6 * plan.part * self.checkpoint_bytes
            self._wait(lambda: self._written() >= enough, processes)
            return
        start = self._resumed() or 0
        self._wait(lambda: steps_logged(self.run) >= start + plan.steps, processes)
        time.sleep(0.05 * plan.part)  # about a step

    def _wait(self, condition: Callable[[], bool], processes: Ranks) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            ended = [process for process in processes if process.poll() is not None]
            assert not ended, f"a rank ended before one was killed: {ended[0].communicate()}"
            assert time.monotonic() < deadline
            self._weigh()
            time.sleep(0.005)

    def _end(self, process: Popen[str]) -> str:
        """What it has said when it has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            self._weigh()
            with suppress(TimeoutExpired):
                return "".join(process.communicate(timeout=0.02))
        raise AssertionError(f"process {process.pid} hangs")

    def _weigh(self) -> None:
        if self.checkpoint_bytes:
            self.peak_bytes = max(self.peak_bytes, size_of(self.run))

    def _resumed(self) -> int | None:
        """The step that the present launch has gone on from, by its log."""
        try:
            with (self.run / "train.log").open(encoding="utf-8") as log:
                log.seek(self._log_start)
                found = re.search(r"\((?:from scratch|resuming at step (\d+)),", log.read())
        except FileNotFoundError:
            return None
        return int(found[1] or 0) if found else None

    def _newest(self) -> int:
        """Step of the newest complete checkpoint after a look at its hashes, -1 if they are wrong."""
        folder = find_latest(self.run)
        if folder is None:
            return 0
        try:
            reader = CheckpointReader(folder)
            reader.verify()
        except CheckpointError:
            return -1
        return reader.state.step

    def _being_written(self) -> int | None:
        """Step of a checkpoint that still has its temporary name and is newer than all complete ones."""
        complete = [step for step, _ in step_folders(self.run / "checkpoints")]
        newest = max(complete, default=0) // EVERY * EVERY
        folder = self.run / "checkpoints" / step_folder(newest + EVERY)
        return newest + EVERY if temporary(folder).exists() else None

    def _written(self) -> int:
        """Bytes in the files of that checkpoint; -1 if there is none."""
        step = self._being_written()
        return -1 if step is None else size_of(temporary(self.run / "checkpoints" / step_folder(step)))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder in which files come and go."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def soak(folder: Path, seed: int, n_kills: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do everything in `folder`; the result, whose "problems" are empty if all is well."""
    runs = Soak(folder, n_kills)
    runs.finish(runs.uncut)
    say(f"uncut run of {runs.max_steps} steps done; a checkpoint has {runs.checkpoint_bytes / 1e6:.0f} MB")
    kills = []
    for number, plan in enumerate(choose(seed, n_kills), start=1):
        kills.append(runs.kill(plan))
        say(f"{number:2}/{n_kills} {kills[-1]}")
    runs.finish(runs.run)
    problems = [problem for kill in kills for problem in kill.problems] + runs.problems()
    say(f"peak on disk {runs.peak_bytes / 1e6:.0f} MB of {runs.most_bytes / 1e6:.0f} MB allowed")
    say("\n".join(problems) or "the run that was killed equals the other one bit for bit, and left nothing")
    return {
        "steps": runs.max_steps,
        "checkpoint_every": EVERY,
        "checkpoint_bytes": runs.checkpoint_bytes,
        "peak_bytes": runs.peak_bytes,
        "allowed_bytes": runs.most_bytes,
        "problems": problems,
        "kills": [asdict(kill) | {"lost": kill.lost} for kill in kills],
    }


REPORT = """\
# A run that is killed again and again

{date}, `{command}`, {machine}.
Two ranks, {steps} steps, a checkpoint of {size:.1f} MB every {checkpoint_every} steps, written in the
background. Each line is a launch of the same command, in which a rank got SIGKILL.

| | rank | while | resumed at | last step | half written | other's exit code | after, s | steps done again |
|---|---|---|---|---|---|---|---|---|
{rows}

{torn} of {n} kills left a half-written checkpoint. Peak on disk: {peak:.0f} MB of {allowed:.0f} MB allowed.
{verdict}
"""
EQUAL = """\
The last launch finished. Metrics, test figures, last and best checkpoint equal those of the same run
without a kill bit for bit, and no temporary file is left."""


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    names = ("rank", "moment", "resumed", "step", "torn", "code", "seconds", "lost")
    rows = [
        " | ".join(
            ["|", str(number), *("-" if kill[name] is None else str(kill[name]) for name in names), "|"]
        )
        for number, kill in enumerate(result["kills"], start=1)
    ]
    return REPORT.format(
        **result, rows="\n".join(row.replace("| |", "|").strip() for row in rows), n=len(rows),
        size=result["checkpoint_bytes"] / 1e6, peak=result["peak_bytes"] / 1e6,
        allowed=result["allowed_bytes"] / 1e6,
        torn=sum(kill["torn"] is not None for kill in result["kills"]),
        verdict="\n".join(result["problems"]) or EQUAL,
    )  # fmt: skip


def main() -> int:
    """Kill, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of ranks and moments (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    add_output(parser)
    args = parser.parse_args()
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} shared CPU cores ({platform.machine()}), torch {torch.__version__},"
        f" load average {os.getloadavg()[0]:.1f} at the start",
    }

    def say(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        result = facts | soak(Path(folder), args.seed, args.kills, say)
    if args.json:
        print(json.dumps(result, indent=2))
    keep(result, report(result), args.output)
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
