"""Experts from files to slots, beside what computes."""

import torch

from megamoe.moe.mixture import Weights
from megamoe.serve.stored_experts import StoredExperts


class DeviceLink:
    """Copies that have ended when they return: on a GPU on a stream of their own, through page-locked memory.

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

    def load(self, stored: StoredExperts, expert: int, into: Weights, slot: int) -> None:
        """Fill a slot when nothing reads what was there."""
        if self._stream is None:
            stored.read(expert, into)
            return
        staged = stored.empty(1, torch.device("cpu"), pinned=True).of(0)
        stored.read(expert, staged)
        with torch.cuda.stream(self._stream):
            if slot in self._last_uses:
                self._stream.wait_event(self._last_uses[slot])
            for row, place in zip(staged, into, strict=True):
                place.copy_(row, non_blocking=True)
        self._stream.synchronize()
