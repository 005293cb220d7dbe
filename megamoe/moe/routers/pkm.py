"""Product-key memory: a table of n^2 values, found by two sets of n keys.

    x = [x_a | x_b],  u_a = x_a A_h^T,  u_b = x_b B_h^T,  u[i n + j] = u_b[i] + u_a[j]      for head h
    y = sum over heads, over the K largest u[i], of relu(u[i]) v_i

with A_h, B_h [n, D / 2], one table v [n^2, D] for all heads, and n the largest number with n^2 <= E F, so
that the layer is as large as a mixture of E experts of width F. The K largest sums are among those of the
K largest of each half, so n^2 keys cost 2 n. Nothing is routed and there are no experts; the top-k in force
does not matter. relu takes the place of the softmax of the first product-key memories, and values start as
those of `sigma`.

Papers: Csordas et al., "Approximating Two-Layer Feedforward Networks for Efficient Transformers", EMNLP
Findings 2023, arXiv 2310.10837, section 3.2; Lample et al., "Large Memory Layers with Product Keys", NeurIPS
2019, arXiv 1907.05242.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_positive
from megamoe.moe.dropout import Dropout
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Mixture, Router, RouterContext, Routing
from megamoe.moe.selection import no_choices


class ProductKeyMemory(Router):
    """A large sparse memory in place of experts."""

    summary = "no experts: a product-key memory of as many values as experts have units"
    paper = "Csordas et al., EMNLP Findings 2023, arXiv 2310.10837"
    cost = "heads * keys values for each token"
    owns_feed_forward = True

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `ProductKeyMemory`."""

        heads: int = option(4, "sets of keys, which share the values")
        keys: int = option(32, "values K that each head reads for a token")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "heads", "keys")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        self.n = math.isqrt(spec.n_experts * spec.d_expert)
        std_in, std_out = spec.dense_stds()
        half = spec.d_model // 2
        self.keys_a = nn.Parameter(spec.normal("keys_a", (options.heads, self.n, half), std_in))
        rest = spec.d_model - half
        self.keys_b = nn.Parameter(spec.normal("keys_b", (options.heads, self.n, rest), std_in))
        self.values = nn.Parameter(spec.normal("values", (self.n**2, spec.d_model), std_out))
        self.dropout = Dropout(spec.dropout, spec.path("activations"))

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """There are none: one figure, whatever k."""
        return 1

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> None:
        """There are none."""

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The scores of both sets of keys."""
        n_keys, half = options.heads * math.isqrt(spec.n_experts * spec.d_expert), spec.d_model // 2
        return [Product(n_tokens, width, n_keys) for width in (half, spec.d_model - half)]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """No choices."""
        return no_choices(x_TD)

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """The weighted values."""
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_THK, places_THK = self.find(x_TD)
            weights_TN = self.dropout(scores_THK.relu().flatten(1), context.token_keys_T)
            weights_TN = weights_TN.to(self.values.dtype)
            y_TD = functional.embedding_bag(
                places_THK.flatten(1), self.values, mode="sum", per_sample_weights=weights_TN
            )
        return y_TD, self(x_TD, context)

    def find(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K largest scores of each head and the values they belong to, both [T, H, K]."""
        x_TD, n_best = at_least_fp32(x_TD), min(self.options.keys, self.n**2)
        n_half = min(n_best, self.n)
        half = self.spec.d_model // 2
        best = [
            torch.einsum("td,hnd->thn", part_TX, at_least_fp32(keys_HNX)).topk(n_half, dim=-1)
            for part_TX, keys_HNX in ((x_TD[:, half:], self.keys_b), (x_TD[:, :half], self.keys_a))
        ]
        sums_THN = (best[0].values[..., :, None] + best[1].values[..., None, :]).flatten(2)
        places_THN = (best[0].indices[..., :, None] * self.n + best[1].indices[..., None, :]).flatten(2)
        scores_THK, which_THK = sums_THN.topk(n_best, dim=-1)
        return scores_THK, places_THN.gather(-1, which_THK)
