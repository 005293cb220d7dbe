"""SimSMoE: experts that keep meeting over the same tokens are pushed apart where they do the same.

A linear router with top-k choices, and for every layer a table c over pairs of experts. After each step
c_ij grows by the share of tokens whose choices contain i and j. A pair with c_ij > `frequency` is checked
in the next step and starts at 0 again. Checked is the similarity of both experts' outputs for the tokens
that they share, over all ranks: with X, Y [n, P] those outputs under a fixed random projection, and their
kernels K, M,

    CKA = HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M)),  HSIC the unbiased estimate

The loss ``similarity`` is the sum of CKA over checked pairs with CKA > `threshold`. Its gradient goes to
the experts, not to the tokens. At k = 1 experts share no tokens, and nothing is checked.

The unbiased estimate is near 0 for unrelated outputs at any n; the published one is not, nor is an rbf
kernel of fixed width: here it is `sigma` times the median distance.

Papers: Do et al., "SimSMoE: Toward Efficient Training Mixture of Experts via Solving Representational
Collapse", NAACL Findings 2025, arXiv 2406.15883; Song et al., "Feature Selection via Dependence
Maximization", JMLR 2012, eq. 5, for HSIC.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.ranks import Ranks
from megamoe.moe.routers.cka import FEWEST_TOKENS, cka
from megamoe.moe.routers.smoe import SMoERouter
from megamoe.moe.routing import LayerSpec, Mixture, RouterContext, Routing

MOST_TOKENS = 1024
"""Tokens that one check looks at, as its cost grows with their square."""


class SimilarityRouter(SMoERouter):
    """Learned linear router with a loss on the similarity of experts that share tokens."""

    summary = "learned linear router, and a loss on experts that do the same for shared tokens"
    paper = "Do et al., NAACL Findings 2025, arXiv 2406.15883"
    cost = "1, more in a few steps"
    balance_loss = 0.01

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `SimilarityRouter`."""

        frequency: float = option(16.0, "steps' worth of all tokens that a pair shares before it is checked")
        threshold: float = option(0.5, "similarity above which a pair is penalised")
        kernel: Literal["linear", "rbf"] = option("linear", "how outputs are compared")
        sigma: float = option(0.8, "width of the rbf kernel, in medians of the distances")
        width: int = option(0, "dimensions P that outputs are projected to; 0: as many as experts")
        similarity_loss: float = option(0.01, "weight of the loss")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "frequency", "sigma")
            require_not_negative("moe.router", self, "width", "similarity_loss")

    options: Options
    table: torch.Tensor
    projection: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        self.register_buffer("table", torch.zeros(spec.n_experts, spec.n_experts))
        width = options.width or spec.n_experts
        projection_PD = spec.normal("projection", (width, spec.d_model), std=spec.d_model**-0.5)
        self.register_buffer("projection", projection_PD)

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The logits, and which experts share tokens; the few steps that check pairs make more."""
        shared = Product(spec.n_experts, n_tokens, spec.n_experts, gradients=0)
        return [*super().products(options, spec, n_tokens), shared]

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """Check the pairs that are due, in training."""
        y_TD, routing = super().mix(x_TD, context, mixture)
        if not self.training:
            return y_TD, routing
        ids_TK, due = routing.expert_ids_TK, self.due().tolist()
        losses = {}
        if due:
            # The tokens may not learn to make experts look different: only the experts may.
            outputs_TKD = mixture.outputs(x_TD.detach(), ids_TK)
            with torch.autocast(x_TD.device.type, enabled=False):
                losses["similarity"] = self._similarity(outputs_TKD, ids_TK, due, context.ranks)
        statistics = pair_shares(ids_TK, self.spec.n_experts).flatten()
        return y_TD, replace(routing, losses=losses, statistics=statistics)

    def due(self) -> torch.Tensor:
        """The pairs to check in this step, [N, 2], i < j; the same on every rank."""
        return (self.table > self.options.frequency).nonzero()

    def _similarity(
        self, outputs_TKD: torch.Tensor, ids_TK: torch.Tensor, pairs: list[list[int]], ranks: Ranks
    ) -> torch.Tensor:
        projected_TKP = functional.linear(at_least_fp32(outputs_TKD), self.projection)
        total = projected_TKP.sum() * 0
        for pair in pairs:
            meets_TPK = ids_TK[:, None, :] == torch.tensor(pair, device=ids_TK.device)[:, None]
            shared_T = meets_TPK.any(-1).all(-1)
            # Of each shared token the outputs of both experts, side by side: [N, 2, P].
            both_NXP = meets_TPK[shared_T].to(projected_TKP.dtype) @ projected_TKP[shared_T]
            both_NXP = of_all_ranks(both_NXP, ranks)[:MOST_TOKENS]
            if len(both_NXP) >= FEWEST_TOKENS:
                value = cka(both_NXP[:, 0], both_NXP[:, 1], self.options.kernel, self.options.sigma)
                total = total + value * (value.detach() > self.options.threshold)
        return total

    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Count the step; pairs that were due start again."""
        shares_EE = statistics_LN[0].view_as(self.table)
        self.table.copy_(self.table.where(self.table <= self.options.frequency, 0) + shares_EE)


def pair_shares(ids_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Share of the tokens whose choices contain experts i and j, for i < j, [E, E] fp32."""
    chosen_TE = functional.one_hot(ids_TK, n_experts).sum(1).float()
    return (chosen_TE.t() @ chosen_TE).triu(1) / max(len(ids_TK), 1)


def of_all_ranks(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The rows of all ranks. Averaged over ranks, gradients through it are those of the global rows."""
    everything, start = ranks.gather(rows)
    own = rows * ranks.world_size - rows.detach() * (ranks.world_size - 1)
    return torch.cat([everything[:start], own, everything[start + len(rows) :]])
