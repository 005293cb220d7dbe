"""LMS: one feed-forward network, to which every domain adds low-rank matrices of its own.

    y = F_2(relu(F_1(x))),  F(x) = (W + V_i U_j) x + b,  V [out, m], U [m, in]

of width E F in place of the experts, for a sequence of source domain i and target domain j, which are the
same unless the data give pairs. Entry 0 is the shared one, of text whose domain is unknown. V starts at
N(0, 0.01^2) and U at 0, so that all domains start as W; neither decays, as most domains are absent from most
steps.

With ``fuse`` (Fuse Distillation) training makes two passes over the text, by its domains and by the shared
entry; the loss is the mean of both, and consistency = mean over tokens of (KL(p || q) + KL(q || p)) / 2 is
added. Each pass has its own memory. Text scored without domains takes the shared entry.

Paper: Xu et al., "Condensing Multilingual Knowledge with Lightweight Language-Specific Modules", EMNLP 2023,
arXiv 2305.13993, eqs. 2-6.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.moe.dropout import Dropout
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Mixture, Router, RouterContext, Routing
from megamoe.moe.selection import no_choices, sequences

SHARED = 0


class LMSRouter(Router):
    """Domain-specific low-rank matrices beside shared ones."""

    summary = "no experts: a wide network and low-rank matrices for each domain of the text"
    paper = "Xu et al., EMNLP 2023, arXiv 2305.13993"
    cost = "E/k, twice that in training with fuse"
    owns_feed_forward = True
    undecayed = frozenset({"v_in", "u_in", "v_out", "u_out"})

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `LMSRouter`."""

        domains: int = option(2, "domains that the data name; their ids are 1 to this")
        rank: int = option(32, "rank m of each domain's matrices")
        fuse: bool = option(False, "learn from the domains' pass into the shared one, in two passes")
        consistency_loss: float = option(1.0, "weight of the divergence between both passes")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "domains", "rank")
            require_not_negative("moe.router", self, "consistency_loss")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        d_inner, n, m = spec.n_experts * spec.d_expert, options.domains + 1, options.rank
        self.w_in = nn.Parameter(spec.normal("w_in", (d_inner, spec.d_model)))
        self.b_in = nn.Parameter(torch.zeros(d_inner))
        self.v_in = nn.Parameter(spec.normal("v_in", (n, d_inner, m), std=0.01))
        self.u_in = nn.Parameter(torch.zeros(n, m, spec.d_model))
        self.w_out = nn.Parameter(spec.normal("w_out", (spec.d_model, d_inner)))
        self.b_out = nn.Parameter(torch.zeros(spec.d_model))
        self.v_out = nn.Parameter(spec.normal("v_out", (n, spec.d_model, m), std=0.01))
        self.u_out = nn.Parameter(torch.zeros(n, m, d_inner))
        self.dropout = Dropout(spec.dropout, spec.path("hidden"))

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """There are none: one figure, whatever k."""
        return 1

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> float:
        """As much as all of them."""
        return float(n_experts * (2 if options.fuse else 1))

    @classmethod
    def routes(cls, options: Any) -> int:
        """Two with Fuse Distillation."""
        return 2 if options.fuse else 1

    @classmethod
    def n_domains(cls, options: Any) -> int:
        """As many as the option says."""
        return int(options.domains)

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The network, and the low-rank matrices beside each of its layers."""
        width, d_inner = spec.d_model, spec.n_experts * spec.d_expert
        sizes = ((width, d_inner), (d_inner, width))
        shared = [Product(n_tokens, inner, columns) for inner, columns in sizes]
        low_rank = [
            Product(n_tokens, *pair)
            for inner, columns in sizes
            for pair in ((inner, options.rank), (options.rank, columns))
        ]
        return shared + low_rank

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """No choices."""
        return no_choices(x_TD)

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """The output of the network with the matrices of each sequence."""
        x_TD = x_TD.to(self.w_in.dtype)
        pairs_B2, lengths = self._pairs(context, x_TD)
        added_TF = _low_rank(x_TD, self.v_in, self.u_in, pairs_B2, lengths)
        hidden_TF = (linear(x_TD, self.w_in, self.b_in) + added_TF).relu()
        hidden_TF = self.dropout(hidden_TF, context.token_keys_T)
        y_TD = linear(hidden_TF, self.w_out, self.b_out)
        return y_TD + _low_rank(hidden_TF, self.v_out, self.u_out, pairs_B2, lengths), self(x_TD, context)

    def _pairs(self, context: RouterContext, x_TD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Source and target entry of each sequence [B, 2], and the sequences' lengths."""
        sequence_T, lengths_B = sequences(context, len(x_TD), x_TD.device)
        pairs_B2 = lengths_B.new_full((len(lengths_B), 2), SHARED)
        if context.domain_T2 is not None:
            pairs_T2 = context.domain_T2
            if context.route_T is not None:
                pairs_T2 = pairs_T2.where(context.route_T[:, None] == 0, SHARED)
            pairs_B2 = pairs_B2.index_copy(0, sequence_T, pairs_T2) if len(x_TD) else pairs_B2
        return pairs_B2, lengths_B.tolist()


def _low_rank(
    x_TX: torch.Tensor, v_NYM: torch.Tensor, u_NMX: torch.Tensor, pairs_B2: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """V_i U_j x of every token, [T, Y], with its sequence's i and j; neither product is materialised."""
    # Indexing the stacked tensors once gives all entries a gradient, zero where the domain is absent.
    v_BYM, u_BMX = v_NYM[pairs_B2[:, 0]], u_NMX[pairs_B2[:, 1]]
    parts = zip(x_TX.split(lengths), v_BYM, u_BMX, strict=True)
    return torch.cat([linear(linear(x_SX, u_MX), v_YM) for x_SX, v_YM, u_MX in parts])
