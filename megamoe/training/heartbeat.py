"""Where each rank of a run is: a file per rank, and a thread that ends the rank when it no longer moves.

A rank that stops inside a collective stops all others there too. Each rank therefore counts what its loop
does (`Heartbeat`), and a thread of its own (`Watch`) writes the count into the run folder and reads those of
the others when this rank has not moved for `training.hang_timeout` seconds.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch._C import _distributed_c10d

from megamoe.config.schema import RunConfig
from megamoe.errors import ExitCode
from megamoe.parallel.launch import World
from megamoe.training.run_folder import write_json

SECONDS_BETWEEN_WRITES = 10.0
MISSED_WRITES = 3
"""A rank that has not written for so many intervals is silent: it is dead, stopped, or cut off."""


class Heartbeat:
    """Where this rank's loop is. Beating costs an assignment; all ranks beat at the same places.

    Attributes:
        beats: how often it has beaten, which tells who is behind.
        step: optimizer steps done.
        phase: what the loop does now.
        time: of the last beat, in seconds of the monotonic clock.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.step = 0
        self.phase = "start"
        self.time = time.monotonic()

    def beat(self, phase: str, step: int) -> None:
        """The loop goes on with `phase` after `step` steps."""
        self.beats += 1
        self.phase, self.step, self.time = phase, step, time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A rank's sign of life, the content of its file.

    Attributes:
        seconds_since_beat: when it was written.
    """

    rank: int
    host: str
    pid: int
    beats: int
    step: int
    phase: str
    seconds_since_beat: float


def sign_file(folder: Path, rank: int) -> Path:
    """Where `rank` writes its sign of life."""
    return folder / f"rank-{rank:05d}.json"


class Watch:
    """Writes this rank's sign of life, and ends the process when the loop has not moved for too long.

    Args:
        heartbeat: of this rank.
        run: the run; `training.hang_timeout` seconds without a beat end it, 0 never does.
        world: the ranks.
        folder: of the signs of all ranks; it must be one that all nodes see.
        option: by which the user sets the limit.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        run: RunConfig,
        world: World,
        folder: Path,
        option: str = "training.hang_timeout",
    ) -> None:
        self.option = option
        self.heartbeat, self.folder = heartbeat, folder
        self.rank, self.world_size = world.rank, world.world_size
        self.timeout = timeout = run.training.hang_timeout
        self.interval = min(SECONDS_BETWEEN_WRITES, timeout / 10 or SECONDS_BETWEEN_WRITES)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; the time counts from now."""
        self.heartbeat.time = time.monotonic()
        self._thread.start()

    def stop(self, *, keep_sign: bool) -> None:
        """End. The sign stays where the run fails, to be looked at."""
        self._over.set()
        self._thread.join()
        if not keep_sign:
            sign_file(self.folder, self.rank).unlink(missing_ok=True)
            with suppress(OSError):  # it holds signs of other ranks still
                self.folder.rmdir()

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self._write()
            if self.timeout and time.monotonic() - self.heartbeat.time > self.timeout:
                self._end()

    def _write(self) -> None:
        heart = self.heartbeat
        sign = Sign(
            rank=self.rank, host=socket.gethostname(), pid=os.getpid(), beats=heart.beats, step=heart.step,
            phase=heart.phase, seconds_since_beat=time.monotonic() - heart.time,
        )  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(sign_file(self.folder, self.rank), asdict(sign))
        except OSError as error:  # a full disk must not end a run that goes on otherwise
            print(f"megamoe: rank {self.rank}: heartbeat: {error}", file=sys.stderr)

    def _end(self) -> None:
        """Leave without waiting for the main thread, which sits in a collective."""
        self._dump_stacks()
        # All ranks notice within one interval of each other; the lowest that lives tells for all.
        self._over.wait(self.interval)
        self._write()
        signs, ages = read_signs(self.folder, self.world_size)
        limit = MISSED_WRITES * self.interval
        silent = [rank for rank, age in enumerate(ages) if age is None or age > limit]
        if self.rank == min(set(range(self.world_size)) - set(silent), default=self.rank):
            report = describe_hang(signs, ages, silent, f"{self.option} = {self.timeout:g}")
            print(f"megamoe: error: {report}\n  stacks of all threads: {self.folder}", file=sys.stderr)
        else:
            self._over.wait(2 * self.interval)  # a launcher ends all when the first has left
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ExitCode.LOST_RANK)

    def _dump_stacks(self) -> None:
        """Python stacks of all threads, and the collectives torch has recorded, beside the signs."""
        place = sign_file(self.folder, self.rank)
        try:
            with place.with_suffix(".stacks").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            if hasattr(_distributed_c10d, "_dump_fr_trace_json"):
                place.with_suffix(".collectives").write_bytes(_distributed_c10d._dump_fr_trace_json())
        except OSError as error:
            print(f"megamoe: rank {self.rank}: stacks: {error}", file=sys.stderr)


def read_signs(folder: Path, world_size: int) -> tuple[list[Sign | None], list[float | None]]:
    """The sign of every rank, and how many seconds before the newest one it was written; None: there is none.

    Times of writing are those of the file system, so clocks of nodes need not agree.
    """
    signs: list[Sign | None] = []
    written: list[float | None] = []
    for rank in range(world_size):
        path = sign_file(folder, rank)
        try:
            written.append(path.stat().st_mtime)
            signs.append(Sign(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            del written[rank:]
            written.append(None)
            signs.append(None)
    newest = max((at for at in written if at is not None), default=0.0)
    return signs, [None if at is None else newest - at for at in written]


def describe_hang(signs: list[Sign | None], ages: list[float | None], silent: list[int], limit: str) -> str:
    """Who holds up a run: ranks that are silent, else those that have beaten least; and where the rest is."""
    known = [sign for sign in signs if sign is not None]
    fewest = min((sign.beats for sign in known), default=0)
    behind = [sign.rank for sign in known if sign.beats == fewest]
    culprits = silent or (behind if len(behind) < len(known) else [])
    lines = [f"{limit}: no progress for so many seconds"]
    for rank in culprits:
        sign, age = signs[rank], ages[rank]
        if sign is None or age is None:
            lines.append(f"rank {rank}: never seen")
            continue
        word = "silent" if silent else "behind"
        ago = age + sign.seconds_since_beat
        lines.append(
            f"rank {rank} on {sign.host} (process {sign.pid}): {word}, last seen {ago:.0f} s ago"
            f" after step {sign.step} in {sign.phase}"
        )
    blamed = set(culprits)
    waiting: dict[str, list[int]] = {}
    for sign in known:
        if sign.rank not in blamed:
            waiting.setdefault(f"after step {sign.step} in {sign.phase}", []).append(sign.rank)
    for place, ranks in waiting.items():
        lines.append(f"waiting {place}: {_ranges(ranks)}")
    if not culprits:
        lines.append("no rank is behind the others: look at the network, at the disk, and at the stacks")
    return "\n  ".join(lines)


def _ranges(ranks: list[int]) -> str:
    """Rising numbers, such as "ranks 0, 2-7"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    names = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}"
