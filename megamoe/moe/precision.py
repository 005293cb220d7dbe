"""The precision floor of whatever must not be computed in 16 bits: routing, weighted sums, losses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or unchanged where it is wider, so that a model in double stays in double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def out_of_autocast(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors in the type that autocast would give a matrix product of them, outside of it.

    For functions with a backward pass of their own, which runs outside of it too.
    """
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        tensors = tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
    with torch.autocast(kind, enabled=False):
        yield tensors
