"""USR1 and TERM ask a run to stop where it can go on.

No torch in here: importing it takes seconds, in which a signal must find its handler in place already.
"""

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamoe.parallel.launch import World

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received = 0


def listen() -> None:
    """From now on note these signals instead of dying of them; main thread only."""
    global _received
    _received = 0
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """From now on these signals do nothing, up to the very end of the process.

    While Python shuts down it puts back the default in place of a handler, but leaves what is ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def agreed(world: "World") -> signal.Signals | None:
    """A signal that some rank got since `listen`, or None; every rank must ask, and all get one answer.

    Once it is a signal, further ones are ignored: a launcher that ends all ranks when the first has left
    must not change how the others leave. A single rank communicates nothing.
    """
    number = world.max(_received)
    if not number:
        return None
    ignore()
    return signal.Signals(number)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number
