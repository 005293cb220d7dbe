"""SMoE: a learned linear router.

    g(x) = x W^T + b
    S = top-k of g(x),  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

with trained W [E, D], started at N(0, init_std^2), and b [E], started at 0.

Paper: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", ICLR 2017, arXiv 1701.06538, without its noise.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.moe.precision import at_least_fp32
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import top_k_softmax


class SMoERouter(Router):
    """Linear router with trained weight and bias."""

    summary = "learned linear router"
    paper = "Shazeer et al., ICLR 2017, arXiv 1701.06538"
    learned: ClassVar[bool] = True

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Router.Options) -> None:
        super().__init__(spec, options)
        weight_ED = spec.normal("weight", (spec.n_experts, spec.d_model))
        for name, value in (("weight", weight_ED), ("bias", torch.zeros(spec.n_experts))):
            if self.learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest logits."""
        logits_TE = linear(at_least_fp32(x_TD), at_least_fp32(self.weight), at_least_fp32(self.bias))
        return top_k_softmax(logits_TE, context.top_k)
