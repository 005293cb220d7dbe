"""Experts from host memory to slots, beside what computes."""

from collections.abc import Sequence

import torch

from megamoe.moe.mixture import Weights


class DeviceLink:
    """Copies that have ended when they return: on a GPU on a stream of their own, from page-locked memory.

    Args:
        device: where the slots are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_uses: dict[int, torch.cuda.Event] = {}

    def used(self, slot: int) -> None:
        """All that reads the slot has been enqueued."""
        if self._stream is not None:
            self._last_uses[slot] = torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, rows: Sequence[torch.Tensor], into: Weights, slot: int) -> None:
        """Copy an expert to a slot when nothing reads what was there."""
        if self._stream is None:
            _copy_all(rows, into)
            return
        with torch.cuda.stream(self._stream):
            if slot in self._last_uses:
                self._stream.wait_event(self._last_uses[slot])
            _copy_all([row.pin_memory() for row in rows], into)
        self._stream.synchronize()


def _copy_all(rows: Sequence[torch.Tensor], into: Weights) -> None:
    for row, place in zip(rows, into, strict=True):
        place.copy_(row, non_blocking=True)
