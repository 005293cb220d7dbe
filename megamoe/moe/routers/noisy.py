"""Noisy top-k: a linear router with noise of a learned size, balanced by two losses.

    h(x) = x W^T + n softplus(x N^T),  n ~ N(0, 1) in training, 0 in evaluation
    S = top-k of h,  w_j = exp(h_j) / sum_{i in S} exp(h_i)  for j in S

Its losses, over the tokens of all ranks, with CV^2 = variance / mean^2 over experts:

    importance = CV^2(sum_x w(x)),  load = CV^2(sum_x P(x)),
    P_e(x) = Phi((x W_e - t_e) / softplus(x N_e)),  t_e = k-th largest h_i with i != e

P_e is the chance that expert e is chosen if its noise alone is drawn again; it is 1 for k = E. W and N
start at N(0, init_std^2) here, at 0 in the paper, where the noise breaks the tie.

Paper: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", ICLR 2017, arXiv 1701.06538, eqs. 3-11.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative
from megamoe.moe.losses import TINY, squared_variation, token_mean
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import top_k_softmax


class NoisyTopKRouter(LinearRouter):
    """Linear router with learned noise."""

    summary = "learned linear router with noise of a learned size"
    paper = "Shazeer et al., ICLR 2017, arXiv 1701.06538"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `NoisyTopKRouter`."""

        importance_loss: float = option(0.1, "weight of the loss on the experts' summed weights")
        load_loss: float = option(0.1, "weight of the loss on the experts' chances to be chosen")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "importance_loss", "load_loss")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        self.noise_weight = nn.Parameter(spec.normal("noise_weight", (spec.n_experts, spec.d_model)))

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The logits, and the size of their noise."""
        return 2 * super().products(options, spec, n_tokens)

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest noisy logits."""
        clean_TE = self.logits(x_TD)
        if not self.training:
            return top_k_softmax(clean_TE, context.top_k)
        size_TE = functional.softplus(
            functional.linear(at_least_fp32(x_TD), at_least_fp32(self.noise_weight))
        )
        noisy_TE = clean_TE + self.spec.gaussian("noise", context, self.spec.n_experts) * size_TE
        routing = top_k_softmax(noisy_TE, context.top_k)
        weights_TE = torch.zeros_like(noisy_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)
        losses = {"importance": squared_variation(context.over_ranks(token_mean(weights_TE)))}
        if context.top_k < self.spec.n_experts:
            chances_TE = _chances(clean_TE, noisy_TE, size_TE, context.top_k)
            losses["load"] = squared_variation(context.over_ranks(token_mean(chances_TE)))
        return Routing(routing.expert_ids_TK, routing.weights_TK, noisy_TE, losses)


def _chances(
    clean_TE: torch.Tensor, noisy_TE: torch.Tensor, size_TE: torch.Tensor, top_k: int
) -> torch.Tensor:
    """P_e(x) [T, E] for k < E."""
    top_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    chosen_TE = noisy_TE >= top_TK[:, top_k - 1 : top_k]
    threshold_TE = top_TK[:, top_k:].where(chosen_TE, top_TK[:, top_k - 1 : top_k])
    return torch.special.ndtr((clean_TE - threshold_TE) / size_TE.clamp_min(TINY))
