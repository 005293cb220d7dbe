"""ReMoE: as many experts as have a positive score, held near k by a loss whose weight adapts.

    g = relu(x W^T),  y = sum_{e: g_e > 0} g_e Expert_e(x)

Its loss ``sparsity`` is lambda (E / k) sum_e f_e mean_t(g_te), with f_e the share of all tokens that
expert e takes. After each step lambda, one number for all layers, is multiplied by `rate` if the mean
share of experts taken was above k / E, and divided by it if it was below. About half of all experts take
a token at first.

Paper: Wang et al., "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", ICLR 2025,
arXiv 2412.14711, eqs. 5-9.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.moe.losses import token_mean
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, check_top_k


class ReLURouter(LinearRouter):
    """Experts with a positive score, each weighted by it."""

    summary = "every expert with a positive score; sparsity held near k / E by an adaptive loss"
    paper = "Wang et al., ICLR 2025, arXiv 2412.14711"
    cost = "E/(2k) at first, then about 1"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `ReLURouter`."""

        sparsity_loss: float = option(1.0, "factor on the loss; lambda is its weight")
        lambda_start: float = option(1e-8, "lambda before the first step")
        rate: float = option(1.2, "factor by which lambda changes at every step")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "lambda_start", "rate")
            require_not_negative("moe.router", self, "sparsity_loss")

    options: Options
    lambda_: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        if self.share(0):
            self.register_buffer("lambda_", torch.tensor([options.lambda_start]))

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """Up to all."""
        return n_experts

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> None:
        """It follows from what is learned."""

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose all experts with a positive score."""
        n_experts = self.spec.n_experts
        logits_TE = self.logits(x_TD)
        weights_TE = logits_TE.relu()
        taken_TE = weights_TE > 0
        ids_TE = torch.arange(n_experts, device=x_TD.device).where(taken_TE, NO_EXPERT)
        if not self.training:
            return Routing(ids_TE, weights_TE, logits_TE)
        check_top_k(context.top_k, n_experts)
        target = context.top_k / n_experts
        shares_E = context.ranks.mean(token_mean(taken_TE.to(weights_TE.dtype)))
        penalty = torch.dot(shares_E, token_mean(weights_TE)) / target
        lambda_ = self.owner.get_buffer("lambda_")[0]
        losses = {"sparsity": lambda_ * penalty}
        return Routing(ids_TE, weights_TE, logits_TE, losses, statistics=shares_E.mean().view(1) - target)

    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Move lambda towards the target, by the mean excess over layers."""
        self.lambda_ *= self.options.rate ** statistics_LN.mean().sign().double()
