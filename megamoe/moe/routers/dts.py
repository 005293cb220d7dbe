"""DTS: from dense to sparse, by a temperature that falls over training.

In training, with Gumbel noise n and the temperature tau(s) at step s,

    p = softmax((x W^T + b + n) / tau(s)),  tau(s) = tau_start + min(s / S, 1) (tau_end - tau_start)
    S = {e : p_e > threshold} and the k largest,  w_e = p_e  for e in S

so nearly all experts take part at first and few at the end. In evaluation p = softmax(x W^T + b), S is
the k largest alone. The weights are not made to sum to 1.

Paper: Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse
Gate", 2021, arXiv 2112.14397.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, check_top_k, choose


class DTSRouter(LinearRouter):
    """Linear router whose choices in training go from nearly all experts to few."""

    summary = "dense to sparse: Gumbel-softmax above a threshold, temperature falling over training"
    paper = "Nie et al., 2021, arXiv 2112.14397"
    cost = "E/k at first, then 1"
    has_bias = True

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `DTSRouter`."""

        tau_start: float = option(2.0, "temperature at the first step")
        tau_end: float = option(0.3, "temperature from step tau_steps on")
        tau_steps: int = option(100_000, "steps S over which the temperature changes")
        threshold: float = option(0.001, "experts of a larger probability take part in training")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "tau_start", "tau_end", "tau_steps")
            require_not_negative("moe.router", self, "threshold")

    options: Options

    def temperature(self, step: int) -> float:
        """tau(s)."""
        o = self.options
        return o.tau_start + min(step / o.tau_steps, 1.0) * (o.tau_end - o.tau_start)

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> None:
        """It follows from what is learned."""

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Take all above the threshold in training, the k largest in evaluation."""
        logits_TE, n_experts = self.logits(x_TD), self.spec.n_experts
        if not self.training:
            weights_TK, ids_TK = choose(logits_TE.softmax(-1), context.top_k)
            return Routing(ids_TK, weights_TK, logits_TE)
        noisy_TE = logits_TE + self.spec.gumbel("noise", context, n_experts)
        p_TE = (noisy_TE / self.temperature(context.step)).softmax(-1)
        sorted_TE, ids_TE = choose(p_TE, n_experts)
        check_top_k(context.top_k, n_experts)
        kept_TE = sorted_TE > self.options.threshold
        kept_TE[:, : context.top_k] = True
        return Routing(ids_TE.where(kept_TE, NO_EXPERT), sorted_TE * kept_TE, logits_TE)
