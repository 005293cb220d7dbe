"""Top-K activation: one wide feed-forward network of which each token keeps its largest hidden units.

    u = relu(x W_in^T + b_in),  W_in [E F, D]
    y = W_out topk(u) + b_out,  topk keeps the k F largest of the E F units

with k the top-k in force: the approximation of a dense network that a mixture of E experts of width F
approximates in blocks. Nothing is routed and there are no experts; all units are computed. Initial values are
those of `sigma`.

Paper: Csordas et al., "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
EMNLP Findings 2023, arXiv 2310.10837, section 3.1.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.moe.dropout import Dropout
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Mixture, Router, RouterContext, Routing
from megamoe.moe.selection import check_top_k, no_choices


class TopKActivation(Router):
    """A dense network with its largest activations."""

    summary = "no experts: a wide network that keeps its k F largest hidden units"
    paper = "Csordas et al., EMNLP Findings 2023, arXiv 2310.10837"
    cost = "E/k, all units are computed"
    owns_feed_forward = True

    def __init__(self, spec: LayerSpec, options: Any) -> None:
        super().__init__(spec, options)
        d_inner, (std_in, std_out) = spec.n_experts * spec.d_expert, spec.dense_stds()
        self.w_in = nn.Parameter(spec.normal("w_in", (d_inner, spec.d_model), std_in))
        self.b_in = nn.Parameter(torch.zeros(d_inner))
        self.w_out = nn.Parameter(spec.normal("w_out", (spec.d_model, d_inner), std_out))
        self.b_out = nn.Parameter(torch.zeros(spec.d_model))
        self.dropout = Dropout(spec.dropout, spec.path("hidden"))

    @classmethod
    def experts_computed(cls, options: Any, top_k: int, n_experts: int) -> float:
        """All."""
        return float(n_experts)

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The network."""
        width, d_inner = spec.d_model, spec.n_experts * spec.d_expert
        return [Product(n_tokens, width, d_inner), Product(n_tokens, d_inner, width)]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """No choices."""
        check_top_k(context.top_k, self.spec.n_experts)
        return no_choices(x_TD)

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """The output of the network."""
        routing = self(x_TD, context)
        hidden_TF = linear(x_TD.to(self.w_in.dtype), self.w_in, self.b_in).relu()
        n_kept = context.top_k * self.spec.d_expert
        smallest_T1 = hidden_TF.detach().topk(n_kept, dim=-1).values[:, -1:]
        kept_TF = self.dropout(hidden_TF * (hidden_TF >= smallest_T1), context.token_keys_T)
        return linear(kept_TF, self.w_out, self.b_out), routing
