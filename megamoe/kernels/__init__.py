"""Compiled kernels for the element-wise work between matrix products on a CPU, for those who ask for them.

Where they are not in use, or cannot take a tensor, their callers compute the same with torch.
"""

import torch

from megamoe.kernels.build import load

TYPES = (torch.float32, torch.bfloat16, torch.int64)
"""int64 are keys of random numbers."""

_in_use = False


def use(compiled: bool) -> None:
    """From now on use the compiled kernels in this process, built if need be, or do not.

    Raises:
        ConfigError: they cannot be built here.
    """
    global _in_use
    _in_use = False
    if compiled:
        load()
        _in_use = True


def in_use() -> bool:
    """Whether `use` has chosen the compiled kernels."""
    return _in_use


def take(x: torch.Tensor) -> bool:
    """Whether the compiled kernels are in use and can work on `x`: it is on a CPU, in one of `TYPES`."""
    return _in_use and x.device.type == "cpu" and x.dtype in TYPES
