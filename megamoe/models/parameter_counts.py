"""How many numbers a model holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from megamoe.moe.experts import Experts


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a whole model.

    Attributes:
        trainable: moved by the optimizer.
        frozen: held still: frozen parameters, and buffers that a checkpoint keeps (hypernetworks).
        experts: of the trainable ones, those inside experts.
    """

    trainable: int
    frozen: int
    experts: int

    @property
    def total(self) -> int:
        """Trainable and frozen."""
        return self.trainable + self.frozen

    @property
    def shared(self) -> int:
        """Trainable ones outside experts."""
        return self.trainable - self.experts

    def active(self, top_k: float, n_experts: int) -> int:
        """Trainable parameters that one token meets when `top_k` of `n_experts` experts are active."""
        return self.shared + int(self.experts * top_k // n_experts)


def parameter_counts(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ParameterCounts:  # fmt: skip
    """Count every tensor of `model` once.

    Args:
        shapes: shape of each parameter by name, where `model` is one rank's part of a larger one.
    """
    in_experts = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    trainable = frozen = experts = 0
    for name, parameter in model.named_parameters():
        size = math.prod(parameter.shape if shapes is None else shapes[name])
        trainable += size if parameter.requires_grad else 0
        frozen += 0 if parameter.requires_grad else size
        experts += size if parameter in in_experts else 0
    saved = model.state_dict().keys()
    frozen += sum(buffer.numel() for name, buffer in model.named_buffers() if name in saved)
    return ParameterCounts(trainable, frozen, experts)
