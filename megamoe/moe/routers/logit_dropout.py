"""Logit dropout: a learned linear router some of whose logits are set to 0 in training.

    g(x) = x W^T + b,  in training g_e <- m_e g_e / (1 - p),  m_e ~ Bernoulli(1 - p)
    S = top-k of g,  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

with one m per token, expert and step.

Paper: Chen et al., "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers",
ICLR 2023, arXiv 2303.01610, whose code has it as a baseline.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_fraction
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import top_k_softmax


class LogitDropoutRouter(LinearRouter):
    """Linear router with dropout on its logits."""

    summary = "learned linear router with dropout on its logits"
    paper = "Chen et al., ICLR 2023, arXiv 2303.01610 (baselines)"
    has_bias = True

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `LogitDropoutRouter`."""

        drop: float = option(0.5, "probability with which a logit is set to 0 in training")

        def __post_init__(self) -> None:
            require_fraction("moe.router", self, "drop")

    options: Options

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest of what is left of the logits."""
        logits_TE, drop = self.logits(x_TD), self.options.drop
        if self.training and drop:
            kept_TE = self.spec.uniform("dropout", context, self.spec.n_experts) >= drop
            logits_TE = logits_TE * kept_TE / (1 - drop)
        return top_k_softmax(logits_TE, context.top_k, ties=self.training)
