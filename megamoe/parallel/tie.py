"""Noticing at once that another rank dies while the ranks start up.

A collective fails when a connection closes. But ranks that form a process group wait in its store for each
other's addresses, and do not notice that one will never come. So each rank holds a connection to rank 0
until training begins, on which nothing comes before `Tie.release`: if it closes, a process has died.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megamoe.errors import ExitCode, MegaMoEError
from megamoe.parallel.launch import World

GRACE_SECONDS = 2.0
"""The main thread may have met the loss too, and knows more."""
CONNECT_SECONDS = 30.0
RELEASED = b"."


@contextmanager
def tied(world: World, host: str) -> Iterator[None]:
    """While this lasts, the death of any rank ends this process with exit code 76.

    Errors that every rank meets, and the end, release the others; any other error takes them along.

    Args:
        world: the ranks.
        host: of rank 0.
    """
    tie = Tie(world, host)
    try:
        yield
    except MegaMoEError:
        tie.release()
        raise
    tie.release()


class Tie:
    """A rank's end of the connections; all ranks must make one at the same place."""

    def __init__(self, world: World, host: str) -> None:
        self._rank = world.rank
        self._over = threading.Event()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        if world.world_size == 1:
            return
        # Others may connect to a port by mistake; who knows the word is of this run.
        word = secrets.token_hex(8)
        if world.is_main:
            listener = socket.create_server(("", 0), backlog=world.world_size)
            world.gather_objects((listener.getsockname()[1], word))
            self._start(lambda: self._watch_others(listener, word))
            return
        port, word = world.gather_objects(None)[0]
        try:
            self._socket = connection = socket.create_connection((host, port), CONNECT_SECONDS)
            connection.settimeout(None)
            connection.sendall(f"{word} {self._rank} ".encode())
        except OSError as error:
            print(f"megamoe: rank {self._rank}: start-up is not watched ({error})", file=sys.stderr)
            return
        self._start(lambda: self._watch_main(connection))

    def release(self) -> None:
        """From now on the others may end without this process."""
        self._over.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(RELEASED)
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        if self._socket is not None:
            self._socket.close()

    def _start(self, watch: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=watch, name="tie", daemon=True)
        self._thread.start()

    def _watch_main(self, connection: socket.socket) -> None:
        if _receive(connection) != RELEASED:
            self._end("rank 0")

    def _watch_others(self, listener: socket.socket, word: str) -> None:
        heard: dict[Any, bytes] = {}
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ)
            over = False
            while not over:
                over = self._over.is_set()  # all have connected then, and some wait to be accepted
                for key, _ in selector.select(timeout=0 if over else 0.1):
                    if key.fileobj is listener:
                        peer = _accept(listener)
                        if peer is None:  # else select would tell of it again at once
                            selector.unregister(listener)
                            continue
                        selector.register(peer, selectors.EVENT_READ)
                        heard[peer] = b""
                    elif received := _receive(key.fileobj):
                        heard[key.fileobj] += received
                    else:
                        selector.unregister(key.fileobj)
                        self._judge(heard.pop(key.fileobj).decode(errors="replace"), word)
        for peer in heard:
            with suppress(OSError), peer:
                peer.sendall(RELEASED)

    def _judge(self, heard: str, word: str) -> None:
        """End if who has said this and closed the connection was a rank that had not released it."""
        _, known, rank = heard.partition(f"{word} ")
        if known and not rank.endswith(RELEASED.decode()):
            self._end(f"rank {rank.strip()}")

    def _end(self, lost: str) -> None:
        """Leave without the main thread, which may wait for the rank that is gone."""
        if self._over.wait(GRACE_SECONDS):
            return
        print(f"megamoe: error: rank {self._rank} lost {lost} before the first step", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ExitCode.LOST_RANK)


def _accept(listener: socket.socket) -> socket.socket | None:
    """Who connects next; None where this process may have no more files open, which must not end the run."""
    try:
        return listener.accept()[0]
    except OSError as error:
        print(f"megamoe: rank 0: not every rank is watched while they start ({error})", file=sys.stderr)
        return None


def _receive(connection: Any) -> bytes:
    try:
        return connection.recv(64)
    except OSError:
        return b""
