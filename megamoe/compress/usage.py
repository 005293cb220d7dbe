"""How much each expert is used on held-out text.

Shapes: T tokens, K choices of a token, E experts, D model width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.load import load_model
from megamoe.models.transformer_xl import Backbone
from megamoe.moe.layer import MoELayer
from megamoe.moe.routing import Routing
from megamoe.moe.selection import choices_per_expert
from megamoe.parallel.launch import read_launch
from megamoe.training.scoring import score


@dataclass(frozen=True)
class Usage:
    """Sums over the tokens that a mixture layer has read.

    Attributes:
        choices_E: how many named each expert.
        contribution_E: weight times norm of the output, where an expert was chosen.
        products_EE: of the router's scores of two experts; None if the policy gives no scores.
    """

    choices_E: torch.Tensor
    contribution_E: torch.Tensor
    products_EE: torch.Tensor | None

    @property
    def frequency_E(self) -> torch.Tensor:
        """Share of the choices."""
        return self.choices_E / self.choices_E.sum()


def measure_usage(
    checkpoint: str | Path, top_k: int, overrides: Iterable[str], max_tokens: int
) -> dict[int, Usage]:
    """Route the validation text through a model.

    Args:
        checkpoint: as `score` takes it.
        top_k: experts per token.
        overrides: of `data` and `evaluation`, see `score`.
        max_tokens: read at most about this many; 0 reads all.

    Returns:
        By mixture layer.

    Raises:
        MegaMoEError: see `score`.
    """
    layers: dict[int, Usage] = {}

    def record(layer: MoELayer, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, Routing]) -> None:
        used = _of_segment(layer, inputs[0].flatten(0, -2), outputs[1])
        layers[layer.layer] = _added(layers[layer.layer], used) if layer.layer in layers else used

    def load_watched(folder: Path) -> Backbone:
        model: Backbone = load_model(folder)
        for layer in model.moe_layers:
            layer.register_forward_hook(record)
        return model

    how = [*overrides, f"evaluation.top_ks={top_k}"]
    score(checkpoint, "valid", how, read_launch(), load_watched, max_tokens=max_tokens)
    return layers


def _of_segment(layer: MoELayer, x_TD: torch.Tensor, routing: Routing) -> Usage:
    assert layer.experts is not None
    ids_TK, n_experts = routing.expert_ids_TK, layer.n_experts
    arrived = layer.exchange.dispatch(x_TD, ids_TK, None, n_experts, None)
    norms_P = layer.experts.outputs(arrived).double().norm(dim=1)
    weighted_P = routing.weights_TK.flatten() * norms_P
    contribution_E = weighted_P.new_zeros(n_experts + 1).index_add_(0, arrived.expert_P, weighted_P)[:-1]
    products_EE = None
    if routing.logits_TE is not None:
        logits_TE = routing.logits_TE.double()
        products_EE = logits_TE.T @ logits_TE
    return Usage(choices_per_expert(ids_TK, n_experts).double(), contribution_E, products_EE)


def _added(a: Usage, b: Usage) -> Usage:
    products_EE = None
    if a.products_EE is not None and b.products_EE is not None:
        products_EE = a.products_EE + b.products_EE
    return Usage(a.choices_E + b.choices_E, a.contribution_E + b.contribution_E, products_EE)
