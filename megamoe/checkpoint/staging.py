"""Copies in host memory, from which a checkpoint is written while training goes on."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from megamoe.checkpoint.shard import Slice


class Staging:
    """Host memory for the slices of one save, kept for the next: allocating it takes longer than the copy.

    It is page-locked where slices come from a GPU, which copies several times faster.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int, int], torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def hold(self, slices: Iterable[Slice]) -> list[Slice]:
        """What `copy` may take until the next optimizer step, called by the thread that trains.

        Only the optimizer's step changes weights and moments; buffers may change in a forward pass.
        """
        held = [
            replace(part, values=part.values.clone()) if part.kind == "buffer" else part for part in slices
        ]
        devices = {part.values.device for part in held if part.values.is_cuda}
        for device in devices:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # what is enqueued by now
        return held

    def copy(self, slices: Sequence[Slice]) -> list[Slice]:
        """`slices` with their values copied. The copies of the call before are overwritten."""
        former, self._buffers = self._buffers, {}
        copies = []
        beside_training: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with beside_training:
            for part in slices:
                values = part.values.detach()
                key = (part.kind, part.name, part.start, part.stop)
                buffer = former.get(key)
                if buffer is None or buffer.dtype != values.dtype:
                    buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                buffer.copy_(values, non_blocking=True)
                self._buffers[key] = buffer
                copies.append(replace(part, values=buffer))
        if self._stream is not None:
            self._stream.synchronize()
        return copies
