"""SMoE: a learned linear router.

    g(x) = x W^T + b
    S = top-k of g(x),  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

with trained W [E, D], started at N(0, init_std^2), and b [E], started at 0.

Paper: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", ICLR 2017, arXiv 1701.06538, without its noise.
"""

import torch

from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import top_k_softmax


class SMoERouter(LinearRouter):
    """Linear router with trained weight and bias."""

    summary = "learned linear router"
    paper = "Shazeer et al., ICLR 2017, arXiv 1701.06538"
    has_bias = True

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest logits."""
        return top_k_softmax(self.logits(x_TD), context.top_k)
