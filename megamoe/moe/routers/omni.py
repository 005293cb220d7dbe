"""Omni-Router: one linear router that all mixture layers share.

    p = softmax(x W^T + n),  n ~ N(0, noise^2) in training, 0 in evaluation
    S = top-k of p,  w_j = p_j  for j in S

with the same W in every layer; each layer decides anew, from its own tokens. The paper takes k = 1. The
weights are not made to sum to 1: at k = 1 they are what teaches the router. W starts at a truncated
normal of standard deviation sqrt(0.1 / D). With `group = n` every n mixture layers in a row share one.

Paper: Gu et al., "Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech
Recognition", 2025, arXiv 2507.05724.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import choose


class OmniRouter(Router):
    """Linear router owned by the lowest mixture layer and used by all."""

    summary = "one learned linear router shared by all mixture layers"
    paper = "Gu et al., 2025, arXiv 2507.05724"
    balance_loss = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `OmniRouter`."""

        group: int = option(0, "mixture layers in a row that share a router; 0: all")
        noise: float = option(0.0, "standard deviation of noise on the logits in training")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "group", "noise")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        if self.share(options.group):
            shape, std = (spec.n_experts, spec.d_model), math.sqrt(0.1 / spec.d_model)
            self.weight = nn.Parameter(spec.truncated_normal("weight", shape, std))

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The logits."""
        return [Product(n_tokens, spec.d_model, spec.n_experts)]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest probabilities of the shared router."""
        logits_TE = functional.linear(at_least_fp32(x_TD), at_least_fp32(self.owner.get_parameter("weight")))
        if self.training and self.options.noise:
            noise_TE = self.spec.gaussian("noise", context, self.spec.n_experts)
            logits_TE = logits_TE + self.options.noise * noise_TE
        weights_TK, ids_TK = choose(logits_TE.softmax(-1), context.top_k)
        return Routing(ids_TK, weights_TK, logits_TE)
