"""XMoE: scores are cosines in a small space, so that no expert wins by the length of its vector.

    u = P x in R^m,  g_e(x) = cos(u, v_e) / max(tau, 0.01)
    S = top-k of g,  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

with trained P [m, D], v [E, m] and temperature tau. m is E / 2 by default.

Paper: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts", NeurIPS 2022,
arXiv 2204.09179, eqs. 6-7.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing
from megamoe.moe.selection import top_k_softmax

LOWEST_TEMPERATURE = 0.01


class CosineRouter(Router):
    """Cosine scores between projected tokens and vectors of the experts."""

    summary = "cosine scores in a low-dimensional space, with a learned temperature"
    paper = "Chi et al., NeurIPS 2022, arXiv 2204.09179"
    balance_loss = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `CosineRouter`."""

        width: int = option(0, "dimensions m of the space; 0: half as many as experts, at least 2")
        temperature: float = option(0.3, "tau at the start")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "width")
            require_positive("moe.router", self, "temperature")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        width = _width(options, spec)
        self.projection = nn.Parameter(spec.normal("projection", (width, spec.d_model)))
        self.centroids = nn.Parameter(spec.orthogonal("centroids", (spec.n_experts, width)))
        self.temperature = nn.Parameter(torch.full((1,), options.temperature))

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The projection, and the cosines."""
        width = _width(options, spec)
        return [Product(n_tokens, spec.d_model, width), Product(n_tokens, width, spec.n_experts)]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest cosines."""
        u_TM = functional.linear(at_least_fp32(x_TD), at_least_fp32(self.projection))
        centroids_EM = at_least_fp32(self.centroids)
        cosines_TE = functional.normalize(u_TM, dim=-1) @ functional.normalize(centroids_EM, dim=-1).t()
        temperature = at_least_fp32(self.temperature).clamp_min(LOWEST_TEMPERATURE)
        return top_k_softmax(cosines_TE / temperature, context.top_k)


def _width(options: CosineRouter.Options, spec: LayerSpec) -> int:
    return options.width or max(2, spec.n_experts // 2)
