"""Bytes: what a forward pass keeps for the backward pass, and the peak of a process."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(module: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct storages that `forward` keeps for the backward pass, without parameters.

    What a custom function hangs on its context without autograd's knowing counts too.
    """
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    kept += _on_contexts(output.grad_fn)
    parameters = storages(module.parameters())
    return sum(size for place, size in storages(kept).items() if place not in parameters)


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages of `tensors`, by their addresses."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _on_contexts(function: Any) -> Iterator[torch.Tensor]:
    """Tensors among the attributes of custom functions of a graph."""
    seen, waiting = set(), [function]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        yield from _tensors_in(list(getattr(function, "__dict__", {}).values()))
        waiting += [below for below, _ in function.next_functions]


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value):
        yield from _tensors_in([getattr(value, field.name) for field in fields(value)])


def peak_bytes() -> int:
    """The most memory that this process has held; not its parent's, which `getrusage` may tell of."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "the kernel tells no peak"
    return int(found[1]) * 1024
