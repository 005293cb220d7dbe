"""Where a rank's tensors lie in the global ones, which checkpoints and inspection speak of.

A global tensor is the whole tensor in row-major order, the experts of all ranks stacked.
"""

import math

import torch
from torch import nn

from megamoe.moe.experts import Experts

Shape = tuple[int, ...]


def placements(model: nn.Module) -> dict[str, tuple[Shape, int]]:
    """By parameter name: its global shape, and the flat position at which this rank's part begins."""
    # A parameter that ZeRO-3 has partitioned is empty and keeps its shape aside.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    placed = {name: (shape, 0) for name, shape in shapes.items()}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for leaf, _ in module.named_parameters():
                name = f"{path}.{leaf}"
                _, *one_expert = shapes[name]
                placed[name] = (module.n_experts, *one_expert), module.local.start * math.prod(one_expert)
    return placed


def global_shapes(model: nn.Module) -> dict[str, Shape]:
    """Global shape of every parameter of `model`."""
    return {name: shape for name, (shape, _) in placements(model).items()}


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `model` that belong into a checkpoint, by name. They are equal on all ranks."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
