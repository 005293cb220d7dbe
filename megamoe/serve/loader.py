"""The thread that loads experts while others are computed."""

import queue
import threading
from contextlib import suppress

from megamoe.errors import CheckpointError
from megamoe.serve.slots import ExpertSlots

WAITING_LAYERS = 256
"""Layers that may wait to be served; beyond that what they expect is loaded on demand."""


class Loader:
    """Serves the layers that wake it, in the order in which they do, until it is closed."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[ExpertSlots | None] = queue.Queue(WAITING_LAYERS)
        self._closed = False
        # As a daemon it holds up no exit, whatever way the program takes.
        self._thread = threading.Thread(target=self._serve, name="expert-loader", daemon=True)
        self._thread.start()

    def wake(self, slots: ExpertSlots) -> None:
        """Load what `slots` expects; returns at once."""
        with suppress(queue.Full):  # it is a hint, no more
            self._waiting.put_nowait(slots)

    def close(self) -> None:
        """End after the copy under way."""
        self._closed = True
        with suppress(queue.Full):  # then something else wakes it
            self._waiting.put_nowait(None)
        self._thread.join()

    def _serve(self) -> None:
        while (slots := self._waiting.get()) is not None and not self._closed:
            with suppress(CheckpointError):  # whoever needs that expert meets the same, and can tell
                slots.load_expected()
