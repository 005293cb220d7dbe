"""THOR: no router; experts are drawn at random, and learn to agree.

    training: two passes over the same text; in each, one expert for all tokens of a layer, drawn anew for
              every layer, step and pass; the loss is the mean of both, and
              consistency = mean over tokens of (KL(p || q) + KL(q || p)) / 2,  p, q both predictions
    evaluation: an expert for each token, a fixed random function of layer and place in the segment
    w = 1

It takes one expert whatever the top-k in force. Each pass has its own memory. A classifier is trained with
one pass and without the loss.

Paper: Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts", ICLR 2022,
arXiv 2110.04260, eqs. 4-6.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megamoe.config.schema import option, require_not_negative
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import places_in_segments


class ThorRouter(Router):
    """Random experts whose predictions are pulled together."""

    summary = "random experts that learn to agree, by two passes over the same text"
    paper = "Zuo et al., ICLR 2022, arXiv 2110.04260"
    cost = "2/k in training, 1/k in evaluation"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `ThorRouter`."""

        consistency_loss: float = option(0.5, "weight of the divergence between both predictions")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "consistency_loss")

    options: Options

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """One."""
        return 1

    @classmethod
    def experts_computed(cls, options: Any, top_k: int, n_experts: int) -> float:
        """One in each pass."""
        return 2.0

    @classmethod
    def routes(cls, options: Any) -> int:
        """Two."""
        return 2

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """None."""
        return []

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Draw."""
        n_tokens, n_experts = len(x_TD), self.spec.n_experts
        if self.training:
            zeros_T = torch.zeros(n_tokens, dtype=torch.long, device=x_TD.device)
            route_T = zeros_T if context.route_T is None else context.route_T
            drawn_R = torch.randint(n_experts, (2,), generator=self.spec.generator("draw", context.step))
            ids_T = drawn_R.to(x_TD.device, non_blocking=True)[route_T]
        else:
            places_T = places_in_segments(context, n_tokens, x_TD.device)
            ids_T = self.spec.lasting_uniform("draw", places_T, n_experts).argmax(-1)
        ones_T1 = torch.ones(n_tokens, 1, dtype=at_least_fp32(x_TD).dtype, device=x_TD.device)
        return Routing(ids_T[:, None], ones_T1)
