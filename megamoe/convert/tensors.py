"""A tensor that is read when it is asked for, so that a conversion never holds a whole model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megamoe.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """One global tensor of a checkpoint that is being read or made.

    Attributes:
        kind: one of `megamoe.checkpoint.format.KINDS`.
        name: global name, the path in the model.
        shape: shape of the whole tensor.
        dtype: what `load` gives.
        load: reads or computes the whole tensor, in host memory. Nothing keeps the result.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes that `load` gives."""
        return self.numel * self.dtype.itemsize

    def checked(self) -> torch.Tensor:
        """What `load` gives.

        Raises:
            CheckpointError: it is not of the promised shape and dtype.
        """
        values = self.load()
        if tuple(values.shape) != self.shape or values.dtype != self.dtype:
            raise CheckpointError(
                f"{self.kind} {self.name}: {values.dtype} {list(values.shape)} was read,"
                f" {self.dtype} {list(self.shape)} expected"
            )
        return values


def lazy(kind: str, name: str, values: torch.Tensor) -> LazyTensor:
    """A tensor that exists already, for small ones."""
    return LazyTensor(kind, name, tuple(values.shape), values.dtype, lambda: values)


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes of all of them, for a progress bar."""
    return sum(tensor.n_bytes for tensor in tensors)
