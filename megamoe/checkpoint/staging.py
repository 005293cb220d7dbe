"""Copies in host memory, from which a checkpoint is written while training goes on."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from megamoe.checkpoint.shard import Slice


class Staging:
    """Host memory for the slices of one save, kept for the next: allocating it takes longer than the copy.

    It is page-locked where slices come from a GPU, which copies several times faster.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int, int], torch.Tensor] = {}

    def copy(self, slices: Iterable[Slice]) -> list[Slice]:
        """`slices` with their values copied. The copies of the call before are overwritten."""
        former, self._buffers = self._buffers, {}
        copies, devices = [], set()
        for part in slices:
            values = part.values.detach()
            key = (part.kind, part.name, part.start, part.stop)
            buffer = former.get(key)
            if buffer is None or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            buffer.copy_(values, non_blocking=True)
            self._buffers[key] = buffer
            copies.append(replace(part, values=buffer))
            devices.add(values.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copies
