"""The tool under mpirun, and ranks that are threads of this process."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe.data.ranks import Ranks
from tests.launchers import require_mpirun

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
SECONDS = 120


def mpirun(size: int, *arguments: object) -> list[str]:
    """The command that starts the tool on `size` ranks."""
    return [*require_mpirun(), "-n", str(size), sys.executable, str(TOOL), *map(str, arguments)]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **environment}
    )


def processes_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank of those that an mpirun has started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        for variable in variables:
            if parent == launcher.pid and variable.startswith(b"OMPI_COMM_WORLD_RANK="):
                found[int(variable.partition(b"=")[2])] = int(entry.name)
    return found


class Threads(Ranks):
    """Ranks that share their memory."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier

    def combine(self, value: Any, merge: Callable[[list[Any]], Any]) -> Any:
        self._table[self.rank] = value
        self._barrier.wait(SECONDS)
        if self.rank == 0:
            self._table[self.size] = merge(self._table[: self.size])
        self._barrier.wait(SECONDS)
        result = self._table[self.size]
        self._barrier.wait(SECONDS)
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._barrier.abort()
            raise


def on_threads(size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What `function` returns on each of `size` ranks."""
    table, barrier = [None] * (size + 1), threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: function(Threads(rank, size, table, barrier)), range(size)))
