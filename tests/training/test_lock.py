"""A run folder belongs to one process at a time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.errors import ConfigError
from megamoe.training.lock import RunLock
from tests.environment import environment

HOLD = """
import sys
from pathlib import Path
from megamoe.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_it_until_the_first_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lock = RunLock(tmp_path)
        message = f"process {holder.pid} on {socket.gethostname()}; wait for it, end it, or give another name"
        with pytest.raises(ConfigError, match=message):
            lock.acquire(patience=0)
        assert lock.holder() == f"process {holder.pid} on {socket.gethostname()}"
    finally:
        holder.kill()
        holder.communicate()
    assert lock.holder() == ""
    lock.acquire(patience=0)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.acquire(patience=0)  # what is held is held
    lock.release()


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    RunLock(tmp_path / "none").acquire()
    assert RunLock(tmp_path / "none").holder() == ""
    assert not (tmp_path / "none").exists()
