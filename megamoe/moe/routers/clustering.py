"""AC router: features in which a token's cluster is tight count for more.

    c = first choice of the mixture layer below for the same token, its cluster
    mu_c = mean of x over cluster c,  s_c = mean of |x - mu_c| over cluster c      (by feature)
    w_c = 1 / (s_c + 1e-4), at most 10 times their mean,  M_c = w_c / mean over clusters of w_c
    g_e(x) = (x * M_c) v_e / ||v_e||
    S = top-k of g,  w_j = exp(g_j) / sum_{i in S} exp(g_i)  for j in S

The experts get x itself; no gradient passes through M. In the lowest mixture layer, and for clusters with
less than `min_share` of the tokens, which are left out of both means, M = 1. v starts orthogonal with rows
of norm 0.32.

With ``stats=running`` mu and s are moving averages over earlier steps and all ranks, so the policy is
causal. With ``stats=batch``, the published form, training takes them from the tokens of the micro-batch on
all ranks, later tokens included; evaluation uses the moving averages.

Paper: Nielsen et al., "Tight Clusters Make Specialized Experts", ICLR 2025, arXiv 2502.15315.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from megamoe.config.schema import option, require_fraction
from megamoe.moe.losses import TINY
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import top_k_softmax

SOFTENER = 1e-4
LARGEST_WEIGHT = 10.0


class ClusteringRouter(LinearRouter):
    """Scores in a space scaled by the tightness of the token's cluster."""

    summary = "scores scaled by how tight the token's cluster is in each feature"
    paper = "Nielsen et al., ICLR 2025, arXiv 2502.15315"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `ClusteringRouter`."""

        stats: Literal["running", "batch"] = option(
            "running", "statistics of earlier steps (causal), or in training those of the batch (not causal)"
        )
        decay: float = option(0.9, "of the moving averages, for each step")
        min_share: float = option(0.002, "clusters with less of the tokens are not scaled")

        def __post_init__(self) -> None:
            require_fraction("moe.router", self, "decay", "min_share")

    options: Options
    moments: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        # Moving averages by cluster: share of tokens, sum of x, share measured, sum of |x - mu|.
        self.register_buffer("moments", torch.zeros(2, spec.n_experts, 1 + spec.d_model))

    def initial_weight(self) -> torch.Tensor:
        """v: orthogonal."""
        return self.spec.orthogonal("weight", (self.spec.n_experts, self.spec.d_model), gain=0.32)

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Scale, then route by the k largest logits."""
        x_TD = at_least_fp32(x_TD)
        statistics = None
        scaled_TD = x_TD
        if context.previous is not None:
            cluster_T = context.previous.expert_ids_TK[:, 0]
            with torch.no_grad():
                moments = self.moments.to(x_TD.dtype)
                if self.training:
                    seen = self._moments_of(x_TD, cluster_T, moments, context)
                    statistics = seen.flatten()
                    moments = seen if self.options.stats == "batch" else moments
                scales_ED = tightness(moments[0], moments[1], self.options.min_share)
            scaled_TD = x_TD * scales_ED[cluster_T]
        directions_ED = functional.normalize(at_least_fp32(self.weight), dim=-1)
        routing = top_k_softmax(functional.linear(scaled_TD, directions_ED), context.top_k)
        return Routing(routing.expert_ids_TK, routing.weights_TK, routing.logits_TE, statistics=statistics)

    def _moments_of(
        self, x_TD: torch.Tensor, cluster_T: torch.Tensor, moments: torch.Tensor, context: RouterContext
    ) -> torch.Tensor:
        """What these tokens add to the moments [2, E, 1 + D]; of all ranks' tokens with batch statistics."""
        over_ranks = context.ranks.mean if self.options.stats == "batch" else torch.Tensor.detach
        firsts_EX = over_ranks(_sums(x_TD, cluster_T, self.spec.n_experts))
        around_EX = firsts_EX if self.options.stats == "batch" else moments[0]
        deviations_TD = (x_TD - _means(around_EX)[cluster_T]).abs()
        seconds_EX = over_ranks(_sums(deviations_TD, cluster_T, self.spec.n_experts))
        # Around a mean that is not known yet there is no deviation.
        return torch.stack([firsts_EX, seconds_EX * (around_EX[:, :1] > 0)])

    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Average the moments of this step in."""
        decay = self.options.decay
        self.moments.mul_(decay).add_(statistics_LN[0].view_as(self.moments), alpha=1 - decay)


def _sums(values_TD: torch.Tensor, cluster_T: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """Share of the tokens and sum of the values over T, by cluster, [E, 1 + D]."""
    rows = functional.pad(values_TD, (1, 0), value=1.0) / max(len(values_TD), 1)
    return rows.new_zeros(n_clusters, rows.shape[1]).index_add(0, cluster_T, rows)


def _means(moments_EX: torch.Tensor) -> torch.Tensor:
    return moments_EX[:, 1:] / moments_EX[:, :1].clamp_min(TINY)


def tightness(firsts_EX: torch.Tensor, seconds_EX: torch.Tensor, min_share: float) -> torch.Tensor:
    """M [E, D] from moments; 1 for clusters too small to be measured."""
    total = firsts_EX[:, 0].sum()
    big_E1 = ((firsts_EX[:, 0] >= min_share * total) & (seconds_EX[:, 0] > 0))[:, None]
    n_big = big_E1.sum().clamp_min(1)
    raw_ED = big_E1 / (_means(seconds_EX) + SOFTENER)
    raw_ED = raw_ED.clamp_max(LARGEST_WEIGHT * raw_ED.sum() / (n_big * raw_ED.shape[1]))
    return (raw_ED * n_big / raw_ED.sum(0).clamp_min(TINY)).where(big_E1, 1.0)
