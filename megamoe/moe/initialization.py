"""Initial values as a function of (seed, name), never of construction order or rank.

Every tensor is drawn from its own generator, so the model is the same whichever ranks build which
part of it, and adding a layer does not change the others.
"""

import torch

from megamoe.moe.randomness import hash_of


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(hash_of(seed, *labels))


def normal(
    shape: tuple[int, ...], std: float, seed: int, *labels: str | int, mean: float = 0.0
) -> torch.Tensor:
    """fp32 draws of N(mean, std^2) for the tensor that `labels` name."""
    if torch.get_default_device().type == "meta":  # a model is counted, and there is nothing to draw
        return torch.empty(shape)
    return torch.randn(shape, generator=generator(seed, *labels)).mul_(std).add_(mean)
