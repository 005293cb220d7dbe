"""A tensor that is read when it is asked for, so that a conversion never holds a whole model."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.checkpoint.dtypes import DTYPES, dtype_name
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch


# What listing sorts and prints.
_NAME = re.compile(r"[!-~]{1,512}")
_DEEPEST = 32


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

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)) or self.name.count(".") > _DEEPEST:
            raise CheckpointError(f"{self.kind}: {str(self.name)[:40]!r} is no name of a tensor")

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


def require_disjoint(tensors: Iterable[LazyTensor], files: Iterable[Path]) -> None:
    """Refuse files whose tensors overlap, which could claim more numbers than any disk holds.

    Raises:
        CheckpointError: weights and buffers have more bytes than the files they are in.
    """
    files = list(files)
    weights = total_bytes(tensor for tensor in tensors if tensor.kind in ("weight", "buffer"))
    if weights > sum(file.stat().st_size for file in files):
        raise CheckpointError(f"file {str(files[0])!r}: its tensors overlap")


def same_bits(a: "torch.Tensor", b: "torch.Tensor") -> bool:
    """Whether two contiguous tensors of one shape and type hold the same bytes, not-a-number included."""
    import torch

    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def total_bytes(tensors: Iterable[LazyTensor]) -> int:
    """Bytes of all of them, for a progress bar."""
    return sum(tensor.n_bytes for tensor in tensors)
