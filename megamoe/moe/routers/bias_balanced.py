"""Loss-free balancing: a bias that only selects, moved against the load of each expert.

    s = sigmoid(x W^T)
    S = top-k of s + b,  w_j = s_j / sum_{i in S} s_i  for j in S
    after each step, with c_e the choices of expert e over all ranks:  b_e <- b_e + rate sign(mean(c) - c_e)

b starts at 0, has no gradient, and never enters a weight.

Paper: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024,
arXiv 2408.15664, algorithm 1, with the weights of DeepSeek-V3, arXiv 2412.19437, eqs. 12-16.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_not_negative
from megamoe.moe.losses import load_shares
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import choose


class BiasBalancedRouter(LinearRouter):
    """Sigmoid scores, balanced by a bias on the selection."""

    summary = "sigmoid scores, balanced without a loss by a bias on the selection"
    paper = "Wang et al., 2024, arXiv 2408.15664; DeepSeek-AI, 2024, arXiv 2412.19437"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `BiasBalancedRouter`."""

        rate: float = option(0.001, "what a bias moves by at every step")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "rate")

    options: Options
    selection_bias: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        self.register_buffer("selection_bias", torch.zeros(spec.n_experts))

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose by score and bias, weigh by score."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        _, ids_TK = choose(scores_TE + self.selection_bias, context.top_k)
        chosen_TK = scores_TE.gather(1, ids_TK)
        routing = Routing(ids_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True), logits_TE)
        if not self.training:
            return routing
        shares_E = load_shares(routing, self.spec.n_experts)
        return Routing(ids_TK, routing.weights_TK, logits_TE, statistics=shares_E)

    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Favour the experts with less than the mean load."""
        shares_E = statistics_LN[0]
        self.selection_bias += self.options.rate * (shares_E.mean() - shares_E).sign()
