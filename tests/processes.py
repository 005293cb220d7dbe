"""The ranks of a run as processes of their own, to be signalled, stopped and killed one by one."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

from tests.environment import environment

PATIENCE_SECONDS = 240


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def ranks(
    n: int,
    *arguments: str,
    folder: Path,
    program: tuple[str, str] = ("-m", "megamoe"),
    of_rank: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[list[subprocess.Popen[str]]]:
    """``megamoe ARGUMENTS`` on `n` ranks, started as a launcher would; none is left at the end.

    `of_rank` are more arguments for some of them.
    """
    shared = {
        "WORLD_SIZE": str(n), "LOCAL_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *arguments, *(of_rank or {}).get(rank, ())], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Wait for `condition`, while all `processes` live."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def handles(process: subprocess.Popen[str], number: Signals) -> bool:
    """Whether `process` has a handler for signal `number`."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
