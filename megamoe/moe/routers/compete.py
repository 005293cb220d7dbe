"""CompeteSMoE: in some steps all experts compute, the strongest win, and the router learns to foresee it.

With the response a_e(x) = mean over features of softplus(Expert_e(x)) and p = softmax(x W^T):

    competing:  S = top-k of a,  w_j = a_j / sum_{i in S} a_i  for j in S
                distill = mean_te (p - t)^2 + theta mean_{t, j in S} (p_j - t_j)^2,  t = sg softmax(a / tau)
                diversity = mean over tokens and k x k pairs of the winners' cosines, the diagonal as 0
    otherwise:  S = top-k of p,  w_j = p_j / sum_{i in S} p_i  for j in S

Evaluation never competes. All experts are asked without gradient and without dropout; the winners compute
once more with both, and w comes from that: the gradients are those of computing all. With
``response=norm``, as in the first version, a = ||Expert_e(x)|| and w is the softmax over the winners' a.

Responses of different experts are close to each other at the start, so at tau = 1 the target t is all but
uniform and teaches little; a smaller tau sharpens it.

Papers: Nguyen et al., "CompeteSMoE - Statistically Guaranteed Mixture of Experts Training via
Competition", 2025, arXiv 2505.13380; Pham et al., "CompeteSMoE - Effective Training of Sparse Mixture of
Experts via Competition", 2024, arXiv 2402.02526.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.errors import ConfigError
from megamoe.moe.losses import token_mean
from megamoe.moe.routers.competition import competes
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import Mixture, RouterContext, Routing
from megamoe.moe.selection import choose, top_k_softmax


class CompeteRouter(LinearRouter):
    """Linear router taught by competitions between all experts."""

    summary = "router taught by steps in which all experts compete"
    paper = "Nguyen et al., 2025, arXiv 2505.13380"
    cost = "1 + rate E/k, 1 in evaluation"
    balance_loss = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `CompeteRouter`."""

        response: Literal["softplus", "norm"] = option("softplus", "how an output is scored; norm: version 1")
        rate: float = option(0.07, "share of the steps in which a layer competes")
        warm_up_steps: int = option(0, "steps before the first competition")
        layers_at_once: int = option(2, "mixture layers that compete in one step at most; 0: any number")
        temperature: float = option(1.0, "tau: below 1 sharpens what the router is taught")
        winners_weight: float = option(0.0, "theta: extra weight of the winners in the distillation")
        distill_loss: float = option(0.01, "weight of the distillation")
        diversity_loss: float = option(0.005, "weight of the similarity between winners' outputs")

        def __post_init__(self) -> None:
            if not 0 <= self.rate <= 1:
                raise ConfigError(f"moe.router.rate = {self.rate}: give a share of the steps in [0, 1]")
            require_positive("moe.router", self, "temperature")
            require_not_negative(
                "moe.router", self, "warm_up_steps", "layers_at_once", "winners_weight", "distill_loss",
                "diversity_loss",
            )  # fmt: skip

    options: Options

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> float:
        """The winners, and in competing steps all experts' forward passes, a third of the work each."""
        return top_k + options.rate * n_experts / 3

    def competes(self, step: int) -> bool:
        """Whether this layer competes in training at `step`: the same on every rank."""
        o = self.options
        return competes(step, self.depth, self.spec.seed, o.rate, o.warm_up_steps, o.layers_at_once)

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest probabilities."""
        return top_k_softmax(self.logits(x_TD), context.top_k)

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """Let all experts compete where the schedule says so."""
        if not (self.training and self.competes(context.step)):
            return super().mix(x_TD, context, mixture)
        respond = RESPONSES[self.options.response]
        responses_TE = mixture.responses(x_TD, respond)
        _, ids_TK = choose(responses_TE, context.top_k)
        outputs_TKD = mixture.outputs(x_TD, ids_TK)
        with torch.autocast(x_TD.device.type, enabled=False):
            won_TK = respond(outputs_TKD.flatten(0, 1)).view(ids_TK.shape)
            is_softplus = self.options.response == "softplus"
            weights_TK = won_TK / won_TK.sum(-1, keepdim=True) if is_softplus else won_TK.softmax(-1)
            y_TD = (weights_TK[:, :, None] * outputs_TKD).sum(1).to(x_TD.dtype)
            logits_TE = self.logits(x_TD)
            losses = {
                "distill": self._distillation(logits_TE.softmax(-1), responses_TE, ids_TK),
                "diversity": similarity(outputs_TKD),
            }
        return y_TD, Routing(ids_TK, weights_TK, logits_TE, losses)

    def _distillation(
        self, p_TE: torch.Tensor, responses_TE: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        errors_TE = (p_TE - (responses_TE / self.options.temperature).softmax(-1)).square()
        of_winners = errors_TE.gather(1, ids_TK).mean(-1)
        return token_mean(errors_TE.mean(-1) + self.options.winners_weight * of_winners)


def similarity(outputs_TKD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens and K x K pairs of the cosine of two outputs, the diagonal counting as 0."""
    directions_TKD = functional.normalize(outputs_TKD, dim=-1)
    cosines_TKK = directions_TKD @ directions_TKD.transpose(1, 2)
    off_diagonal_T = cosines_TKK.sum((1, 2)) - cosines_TKK.diagonal(dim1=1, dim2=2).sum(-1)
    return token_mean(off_diagonal_T) / outputs_TKD.shape[1] ** 2


RESPONSES = {
    "softplus": lambda rows_ND: functional.softplus(rows_ND).mean(-1),
    "norm": lambda rows_ND: rows_ND.norm(dim=-1),
}
