"""How many numbers a model holds."""

from typing import NamedTuple

from torch import nn


class ParameterCounts(NamedTuple):
    """`total` is the sum of what training moves and of what is frozen but saved all the same."""

    total: int
    trainable: int
    frozen: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count every tensor of `model` once; frozen hypernetworks are buffers and count as frozen."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen += sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return ParameterCounts(trainable + frozen, trainable, frozen)
