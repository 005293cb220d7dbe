"""One job at a time in a run folder: two would overwrite each other's checkpoints."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from megamoe.errors import ConfigError

LOCK = ".lock"
PATIENCE_SECONDS = 30.0
"""A job that was killed may take a while to die, and its node to give its locks back."""


class RunLock:
    """The right to write into `root`, held by one process until it calls `release` or dies.

    Args:
        root: a run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file: TextIO | None = None

    def acquire(self, patience: float = PATIENCE_SECONDS) -> None:
        """Take it, if the folder exists; nothing happens where it is held already.

        On a file system without locks it says so once and goes on.

        Raises:
            ConfigError: another process still holds it after `patience` seconds, or it cannot be made.
        """
        if self._file is not None or not self.root.is_dir():
            return
        try:
            file = (self.root / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir: {self.root} cannot be written ({error})") from None
        try:
            self._wait_for(file, patience)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise ConfigError(
                f"name: {self.root} is being written by {holder}; wait for it, end it, or give another name"
            ) from None
        except OSError as error:
            print(f"megamoe: {self.root}: no locks here ({error}); start one job at a time", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """Who holds it, which is not waited for and not changed; empty where nobody does."""
        try:
            with (self.root / LOCK).open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _holder(file)
        except OSError:  # there is no file, or there are no locks
            pass
        return ""

    def _wait_for(self, file: TextIO, patience: float) -> None:
        deadline = time.monotonic() + patience
        told = False
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            if not told:
                told = True
                print(
                    f"megamoe: {self.root} is held by {_holder(file)}; waiting up to {patience:g} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            time.sleep(0.5)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read(200) or "another process"
