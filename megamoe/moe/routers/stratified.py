"""Stratified MoE: experts stand in strata; a token passes through one to all of them.

The experts are split into strata 1..L. Gate i sees those of strata i..L. A token starts at gate 1 with
x_1 = x. At gate i

    x' = LayerNorm_i(x_i),  G = softmax(x' W_i^T) over the visible experts,  S = top-k of G
    x_j = x_i + sum_{e in S} G_e Expert_e(x'),  j = stratum of argmax G, plus 1

and it goes on at gate j, or leaves if j > L. The layer's output is the last x_j minus x; the block around it
adds x. Where fewer experts than k are visible, all of them are chosen. No choice is dropped.

Its loss ``strata`` is the mean over gates of E_i sum_e f_e P_e, f from the first choices and P from the
mean of G over the tokens of all ranks that stand at gate i: 1 at balance.

Paper: Xu et al., "Towards Being Parameter-Efficient: A Stratified Sparsely Activated Transformer with
Dynamic Capacity", EMNLP Findings 2023, arXiv 2305.02176.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative
from megamoe.errors import ConfigError
from megamoe.moe.losses import TINY, token_mean
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routing import LayerSpec, Mixture, Router, RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, check_top_k, choose


class StratifiedRouter(Router):
    """One gate for each stratum; every rank makes all passes, whatever its tokens do."""

    summary = "experts in strata; a token may pass through several of them"
    paper = "Xu et al., EMNLP Findings 2023, arXiv 2305.02176"
    cost = "1 to the number of strata"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `StratifiedRouter`."""

        strata: tuple[int, ...] = option(
            (), "experts of each stratum, from the lowest; empty: E/4 and the rest"
        )
        strata_loss: float = option(0.01, "weight of the balance loss of the gates")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "strata_loss")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        n_experts, strata = spec.n_experts, _strata(options, spec)
        if min(strata) < 1 or sum(strata) != n_experts:
            raise ConfigError(
                f"moe.router.strata = {options.strata}: give numbers above 0 that sum to moe.n_experts ="
                f" {n_experts}"
            )
        self.starts = list(accumulate(strata, initial=0))[:-1]  # first expert of each stratum
        self.gates = nn.ParameterList(
            spec.normal(f"gates.{i}", (n_experts - start, spec.d_model))
            for i, start in enumerate(self.starts)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(spec.d_model) for _ in strata)

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> None:
        """It follows from what is learned."""

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """All gates, each for all tokens."""
        starts = accumulate(_strata(options, spec)[:-1], initial=0)
        return [Product(n_tokens, spec.d_model, spec.n_experts - start) for start in starts]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """The choices at the first gate."""
        return self._choose(0, self._normalised(0, x_TD), context.top_k)

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """Make one pass for each stratum; a token takes part in that of the gate it stands at."""
        y_TD = torch.zeros_like(x_TD)
        gate_T = torch.zeros(len(x_TD), dtype=torch.long, device=x_TD.device)
        passes, losses = [], []
        for gate in range(len(self.starts)):
            here_T1 = (gate_T == gate)[:, None]
            with torch.autocast(x_TD.device.type, enabled=False):
                inner_TD = self._normalised(gate, x_TD + y_TD)
                chosen = self._choose(gate, inner_TD, context.top_k)
                if self.training:
                    losses.append(self._balance(gate, chosen, here_T1, context))
            ids_TK = chosen.expert_ids_TK.where(here_T1, NO_EXPERT)
            weights_TK = chosen.weights_TK * here_T1
            y_TD = y_TD + mixture.combine(inner_TD.to(x_TD.dtype), ids_TK, weights_TK)
            passes.append(Routing(ids_TK, weights_TK, chosen.logits_TE))
            gate_T = self._next_gate(chosen.expert_ids_TK[:, 0]).where(here_T1[:, 0], gate_T)
        return y_TD, Routing(
            torch.cat([one.expert_ids_TK for one in passes], 1),
            torch.cat([one.weights_TK for one in passes], 1),
            passes[0].logits_TE,
            {"strata": torch.stack(losses).mean()} if losses else {},
        )

    def _next_gate(self, first_T: torch.Tensor) -> torch.Tensor:
        """The gate above the stratum of each token's first choice, [T]."""
        return sum((first_T >= start for start in self.starts[1:]), torch.ones_like(first_T))

    def _normalised(self, gate: int, x_TD: torch.Tensor) -> torch.Tensor:
        gain_D, bias_D = map(at_least_fp32, self.norms[gate].parameters())
        return functional.layer_norm(at_least_fp32(x_TD), gain_D.shape, gain_D, bias_D)

    def _choose(self, gate: int, x_TD: torch.Tensor, top_k: int) -> Routing:
        """Of the experts that the gate sees, the k largest; ids over all experts, logits over those seen."""
        check_top_k(top_k, self.spec.n_experts)
        logits_TV = functional.linear(at_least_fp32(x_TD), at_least_fp32(self.gates[gate]))
        weights_TK, places_TK = choose(logits_TV.softmax(-1), min(top_k, logits_TV.shape[1]))
        return Routing(places_TK + self.starts[gate], weights_TK, logits_TV)

    def _balance(
        self, gate: int, chosen: Routing, here_T1: torch.Tensor, context: RouterContext
    ) -> torch.Tensor:
        """E_i sum_e f_e P_e over the tokens of all ranks at the gate; 0 where there are none."""
        assert chosen.logits_TE is not None
        n_visible = chosen.logits_TE.shape[1]
        first_T = chosen.expert_ids_TK[:, 0] - self.starts[gate]
        first_TV = functional.one_hot(first_T, n_visible)
        p_TV = chosen.logits_TE.softmax(-1)
        at_gate_TX = torch.cat([here_T1, first_TV * here_T1, p_TV * here_T1], 1)
        share, first_V, p_V = context.over_ranks(token_mean(at_gate_TX)).split([1, n_visible, n_visible])
        return n_visible * torch.dot(first_V, p_V) / share.square().sum().clamp_min(TINY)


def _strata(options: StratifiedRouter.Options, spec: LayerSpec) -> tuple[int, ...]:
    quarter = max(1, spec.n_experts // 4)
    return options.strata or tuple(n for n in (quarter, spec.n_experts - quarter) if n)
