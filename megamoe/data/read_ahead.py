"""The next step's batch is read while the present step computes."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import torch

BatchT = TypeVar("BatchT", bound=tuple[Any, ...], covariant=True)


class Stream(Protocol[BatchT]):
    """Batches by step."""

    def batch(self, step: int) -> BatchT:
        """The batch to read at `step`."""
        ...


class ReadAhead(Generic[BatchT]):
    """A stream whose next batch is ready when it is asked for.

    A batch is a function of its step alone, so that reading it earlier changes nothing. The thread ends with
    this object.

    Args:
        stream: batches are named tuples of tensors and other things.
        device: where the batches go; for a GPU their tensors are pinned, so that copying need not be waited
            for.
    """

    def __init__(self, stream: Stream[BatchT], device: torch.device) -> None:
        self._stream, self._pin = stream, device.type == "cuda"
        prepare: dict[str, Any] = {}
        if self._pin:  # a thread of its own would pin with the first GPU
            prepare = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead", **prepare)
        self._next: tuple[int, Future[BatchT]] | None = None

    def batch(self, step: int) -> BatchT:
        """The batch of `step`; the reading of the one after it has begun.

        Raises:
            Exception: what the stream raised when it read this batch.
        """
        if self._next is None or self._next[0] != step:
            self._begin(step)
        assert self._next is not None
        batch = self._next[1].result()
        self._begin(step + 1)
        return batch

    def _begin(self, step: int) -> None:
        self._next = step, self._reader.submit(self._read, step)

    def _read(self, step: int) -> BatchT:
        batch = self._stream.batch(step)
        return _pinned(batch) if self._pin else batch


def _pinned(batch: Any) -> Any:
    values = (value.pin_memory() if isinstance(value, torch.Tensor) else value for value in batch)
    return type(batch)(*values)
