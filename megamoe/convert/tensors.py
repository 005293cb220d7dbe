"""A tensor that is read when it is asked for, so that a conversion never holds a whole model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamoe.checkpoint.dtypes import DTYPES, dtype_name
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LazyTensor:
    """One global tensor of a checkpoint that is being read or made.

    Attributes:
        kind: one of `megamoe.checkpoint.format.KINDS`.
        name: global name, the path in the model.
        shape: shape of the whole tensor.
        dtype: name of the type that `load` gives.
        load: reads or computes the whole tensor, in host memory. Nothing keeps the result.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    load: "Callable[[], torch.Tensor]"

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes that `load` gives."""
        return self.numel * DTYPES[self.dtype].itemsize

    def checked(self) -> "torch.Tensor":
        """What `load` gives.

        Raises:
            CheckpointError: it is not of the promised shape and dtype.
        """
        values = self.load()
        dtype = dtype_name(values.dtype)
        if tuple(values.shape) != self.shape or dtype != self.dtype:
            raise CheckpointError(
                f"{self.kind} {self.name}: {dtype} {list(values.shape)} was read,"
                f" {self.dtype} {list(self.shape)} expected"
            )
        return values


def lazy(kind: str, name: str, values: "torch.Tensor") -> LazyTensor:
    """A tensor that exists already, for small ones."""
    return LazyTensor(kind, name, tuple(values.shape), dtype_name(values.dtype), lambda: values)


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes of all of them, for a progress bar."""
    return sum(tensor.n_bytes for tensor in tensors)
