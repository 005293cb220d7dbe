"""Initial values of Transformer-XL, as published."""

import torch
from torch import nn

from megamoe.config.schema import ModelConfig
from megamoe.moe.initialization import normal


@torch.no_grad()
def initialize(transformer: nn.Module, model: ModelConfig, seed: int) -> None:
    """Draw every parameter outside the mixture layers, which draw their own, from (seed, name).

    Weights and the attention biases u, v start at N(0, init_std^2), norms at N(1, init_std^2),
    adaptive projections at N(0, projection_init_std^2), all other biases at 0.
    """
    for name, parameter in transformer.named_parameters():
        if ".moe." not in name:
            parameter.copy_(initial_values(name, tuple(parameter.shape), model, seed))


def initial_values(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> torch.Tensor:
    """What `initialize` draws for the parameter `name`, fp32."""
    mean, std = _distribution(name, model)
    return normal(shape, std, seed, name, mean=mean)


def _distribution(name: str, model: ModelConfig) -> tuple[float, float]:
    owner, _, leaf = name.rpartition(".")
    if owner.endswith("norm") and leaf == "weight":
        return 1.0, model.init_std
    if owner == "output.biases" or leaf in ("bias", "b_in", "b_out", "cluster_bias"):
        return 0.0, 0.0
    if owner.endswith("projections"):
        return 0.0, model.projection_init_std
    return 0.0, model.init_std
