"""Dense: every expert for every token, each with weight 1.

    y(x) = sum_e m_e Expert_e(x),  m_e = 1

which is one feed-forward network of hidden width E * F. With ``drop = p`` whole experts are dropped
in training: m_e ~ Bernoulli(1 - p), one draw per expert, step and layer, not rescaled, so evaluation
(m_e = 1) is the full network. If a draw would drop all experts, the one whose draw came closest to
surviving is kept, so that every step trains something.

The top-k in force does not matter to this policy.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megamoe.config.schema import option
from megamoe.errors import ConfigError
from megamoe.moe.initialization import generator
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing


class DenseRouter(Router):
    """All experts with weight 1, optionally without some of them in training."""

    summary = "every expert with weight 1, equal to one wide feed-forward network"
    paper = "Chen et al., ICLR 2023, arXiv 2303.01610 (baselines)"
    cost = "E/k"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `DenseRouter`."""

        drop: float = option(0.0, "probability with which an expert sits out a training step")

        def __post_init__(self) -> None:
            if not 0 <= self.drop < 1:
                raise ConfigError(f"moe.router.drop = {self.drop}: give a probability in [0, 1)")

    options: Options

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """All of them."""
        return n_experts

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> float:
        """Those that are not dropped."""
        return n_experts * (1 - options.drop)

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """None."""
        return []

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose all experts, or those that the mask of this step keeps."""
        n_experts, drop = self.spec.n_experts, self.options.drop
        keep_E = torch.ones(n_experts, dtype=torch.bool)
        if self.training and drop > 0:
            draws = generator(context.seed, "dense drop", context.step, self.spec.layer)
            survival_E = torch.rand(n_experts, generator=draws)
            keep_E = survival_E >= min(drop, survival_E.max().item())
        keep_E = keep_E.to(x_TD.device, non_blocking=True)
        ids_E = torch.arange(n_experts, device=x_TD.device).where(keep_E, -1)
        n_tokens = x_TD.shape[0]
        return Routing(ids_E.expand(n_tokens, -1), keep_E.float().expand(n_tokens, -1))
