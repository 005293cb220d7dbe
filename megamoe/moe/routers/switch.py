"""Switch: one expert per token, weighted by its probability, up to a capacity.

    p = softmax(x' W^T),  x' = x u with u ~ U(1 - jitter, 1 + jitter) in training, x' = x in evaluation
    e = argmax p,  y = p_e Expert_e(x)

W has no bias and starts at a truncated normal of standard deviation sqrt(0.1 / D). Of each sequence of T
tokens an expert takes the first ceil(capacity_factor T / E) that come to it; the layer adds nothing to
the others. p_e is not divided by itself: at one expert it is what teaches the router.

It takes one expert whatever the top-k in force.

Paper: Fedus et al., "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity", JMLR 2022, arXiv 2101.03961, eqs. 1-4.
"""

import math
from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_fraction, require_not_negative
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import choose, within_capacity


class SwitchRouter(LinearRouter):
    """One expert per token, with jitter, capacity and a balance loss."""

    summary = "one expert, weighted by its probability, up to a capacity"
    paper = "Fedus et al., JMLR 2022, arXiv 2101.03961"
    cost = "1/k"
    balance_loss = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `SwitchRouter`."""

        capacity_factor: float = option(
            1.25, "an expert's tokens of a sequence in training, in units of an even share; 0: no limit"
        )
        eval_capacity_factor: float = option(2.0, "the same in evaluation")
        jitter: float = option(0.01, "in training the router's input is scaled by up to this, up or down")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "capacity_factor", "eval_capacity_factor")
            require_fraction("moe.router", self, "jitter")

    options: Options

    def initial_weight(self) -> torch.Tensor:
        """A truncated normal of standard deviation sqrt(0.1 / D)."""
        spec = self.spec
        shape, std = (spec.n_experts, spec.d_model), math.sqrt(0.1 / spec.d_model)
        return spec.truncated_normal("weight", shape, std)

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """One."""
        return 1

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Send each token to its most probable expert."""
        options, factor = self.options, self.options.eval_capacity_factor
        if self.training:
            factor = options.capacity_factor
            x_TD = at_least_fp32(x_TD)
            noise_TD = self.spec.uniform("jitter", context, self.spec.d_model).to(x_TD.dtype)
            x_TD = x_TD * (1 + options.jitter * (2 * noise_TD - 1))
        logits_TE = self.logits(x_TD)
        weights_TK, ids_TK = choose(logits_TE.softmax(-1), 1)
        return within_capacity(Routing(ids_TK, weights_TK, logits_TE), factor, context, self.spec.n_experts)
