"""Dense: every expert for every token, each with weight 1.

    y(x) = sum_e m_e Expert_e(x),  m_e = 1

which is one feed-forward network of hidden width E * F. With ``drop = p`` whole experts are dropped
in training: m_e ~ Bernoulli(1 - p), one draw per expert, step and layer, not rescaled, so evaluation
(m_e = 1) is the full network. If a draw would drop all experts, the one whose draw came closest to
surviving is kept, so that every step trains something.

The top-k in force does not matter to this policy.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megamoe.errors import ConfigError
from megamoe.moe.initialization import generator
from megamoe.moe.routing import Router, RouterContext, Routing


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """Options of `DenseRouter`.

    Attributes:
        drop: probability in [0, 1) with which an expert sits out a training step.
    """

    drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"moe.router.drop = {self.drop}: give a probability in [0, 1)")


class DenseRouter(Router):
    """All experts with weight 1, optionally without some of them in training."""

    summary = "every expert with weight 1, equal to one wide feed-forward network"
    paper = "Chen et al., ICLR 2023, arXiv 2303.01610 (baselines)"
    Options: ClassVar[type] = DenseOptions

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        layer: int,
        seed: int,
        init_std: float,
        options: DenseOptions,
    ) -> None:
        super().__init__(d_model, n_experts, layer=layer, seed=seed)
        self.drop = options.drop

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose all experts, or those that the mask of this step keeps."""
        keep_E = torch.ones(self.n_experts, dtype=torch.bool)
        if self.training and self.drop > 0:
            draws_E = torch.rand(
                self.n_experts, generator=generator(context.seed, "dense", context.step, self.layer)
            )
            keep_E = draws_E >= min(self.drop, draws_E.max().item())
        keep_E = keep_E.to(x_TD.device)
        ids_E = torch.arange(self.n_experts, device=x_TD.device).where(keep_E, -1)
        n_tokens = x_TD.shape[0]
        return Routing(ids_E.expand(n_tokens, -1), keep_E.float().expand(n_tokens, -1))
