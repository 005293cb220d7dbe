"""sigma-MoE: experts that do not compete; the layer is an approximation of one wide network.

    s = sigmoid(x W^T),  in training s_e <- m_e s_e,  m_e ~ Bernoulli(1 - drop)
    S = top-k of s,  w_j = s_j  for j in S

with one m per token and expert, not rescaled; a dropped expert is not computed even if fewer than k are
left. The weights are not made to sum to 1. Its loss ``entropy``, over the tokens of all ranks and from
the logits before dropout, is

    sum_e P_e ln P_e,  P = mean over tokens of softmax(x W^T)

Initial values make the layer's variance that of a dense network of the width of all experts together:
w_in ~ N(0, 2 / (D L)), w_out ~ N(0, 2 / (E F L)) in a model of L layers; W is as w_in, with rows of
equal norm. (L is for pre-norm models, as published.) The paper's experts have no biases; here they start
at 0.

Paper: Csordas et al., "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
EMNLP Findings 2023, arXiv 2310.10837, eqs. 11-21.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_fraction, require_not_negative
from megamoe.moe.losses import negative_entropy
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, choose


class SigmaRouter(LinearRouter):
    """Independent sigmoid scores, expert dropout and an entropy loss."""

    summary = "independent sigmoid scores with expert dropout and an entropy loss"
    paper = "Csordas et al., EMNLP Findings 2023, arXiv 2310.10837"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `SigmaRouter`."""

        drop: float = option(0.05, "probability with which an expert is out of a token's choice in training")
        entropy_loss: float = option(0.001, "weight of the loss that spreads the choices")

        def __post_init__(self) -> None:
            require_fraction("moe.router", self, "drop")
            require_not_negative("moe.router", self, "entropy_loss")

    options: Options

    def initial_weight(self) -> torch.Tensor:
        """Rows of equal norm, of the standard deviation of the experts' w_in."""
        spec, std = self.spec, self.initial_stds()[0]
        weight_ED = spec.normal("weight", (spec.n_experts, spec.d_model), std)
        weight_ED = weight_ED / weight_ED.norm(dim=1, keepdim=True)
        return weight_ED * (std / weight_ED.std())

    def initial_stds(self) -> tuple[float, float]:
        """Those of a dense network as wide as all experts together."""
        return self.spec.dense_stds()

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route by the k largest scores."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        if not self.training:
            weights_TK, ids_TK = choose(scores_TE, context.top_k)
            return Routing(ids_TK, weights_TK, logits_TE)
        kept_TE = self.spec.uniform("dropout", context, self.spec.n_experts) >= self.options.drop
        weights_TK, ids_TK = choose(scores_TE * kept_TE, context.top_k)
        ids_TK = ids_TK.where(kept_TE.gather(1, ids_TK), NO_EXPERT)
        losses = {"entropy": negative_entropy(logits_TE, context)}
        return Routing(ids_TK, weights_TK, logits_TE, losses)
