"""What is in a checkpoint, as a tree of names."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megamoe.checkpoint.format import KINDS
from megamoe.convert.tensors import LazyTensor


@dataclass(frozen=True)
class Row:
    """A tensor, or all tensors below a path, in a listing.

    Attributes:
        depth: components of the path before it.
        label: last component of the path.
        n_bytes: of all tensors in it.
        shape: of a tensor, None of a path.
        dtype: of a tensor, else empty.
        norm: L2 norm over all its numbers; None where it was not asked for.
    """

    depth: int
    label: str
    n_bytes: int
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    norm: float | None = None


def tree(tensors: Sequence[LazyTensor], norm: Callable[[LazyTensor], float] | None = None) -> Iterator[Row]:
    """The tensors by kind and path, each path before what is in it.

    Args:
        tensors: of a checkpoint.
        norm: gives the norm of a tensor, and reads it for that; None shows none.
    """
    paths = [((tensor.kind, *tensor.name.split(".")), tensor) for tensor in tensors]
    paths.sort(key=lambda item: (KINDS.index(item[1].kind), [_natural(part) for part in item[0]]))
    below: dict[tuple[str, ...], int] = defaultdict(int)
    for path, tensor in paths:
        for depth in range(1, len(path)):
            below[path[:depth]] += tensor.n_bytes
    former: tuple[str, ...] = ()
    for path, tensor in paths:
        for depth in range(1, len(path)):
            if former[:depth] != path[:depth]:
                yield Row(depth - 1, path[depth - 1], below[path[:depth]])
        value = norm(tensor) if norm else None
        yield Row(len(path) - 1, path[-1], tensor.n_bytes, tensor.shape, tensor.dtype, value)
        former = path


def _natural(part: str) -> tuple[int, str]:
    """Sorts layer 10 after layer 9."""
    return (int(part), "") if part.isdecimal() else (-1, part)


def norm_of(tensor: LazyTensor) -> float:
    """L2 norm over all numbers of a tensor, which is read for that."""
    return float(tensor.checked().double().norm())
