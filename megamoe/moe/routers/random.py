"""Random: choices that do not look at the token, the floor that a router has to beat.

    u_e ~ U(0, 1)
    S = top-k of u,  w_j = exp(u_j) / sum_{i in S} exp(u_i)  for j in S

In training u is drawn for each token and step; in evaluation it is a fixed function of the layer and
the token's place in its segment, so that figures repeat.

Paper: Chen et al., "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
ICLR 2023, arXiv 2303.01610, among its baselines.
"""

from typing import Any

import torch

from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import places_in_segments, top_k_softmax


class RandomRouter(Router):
    """Random experts; nothing is learned."""

    summary = "random experts, a baseline that ignores the token"
    paper = "Chen et al., ICLR 2023, arXiv 2303.01610 (baselines)"

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """None."""
        return []

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Draw scores and route by the k largest."""
        if self.training:
            scores_TE = self.spec.uniform("scores", context, self.spec.n_experts)
        else:
            places_T = places_in_segments(context, len(x_TD), x_TD.device)
            scores_TE = self.spec.lasting_uniform("scores", places_T, self.spec.n_experts)
        routing = top_k_softmax(scores_TE.to(at_least_fp32(x_TD).dtype), context.top_k)
        return Routing(routing.expert_ids_TK, routing.weights_TK)
