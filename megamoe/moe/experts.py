"""The experts of one mixture layer: stacked two-layer MLPs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import linear

from megamoe.moe.copies import Copies
from megamoe.moe.dropout import Dropout
from megamoe.moe.exchange import Arrived
from megamoe.moe.grouped import mix_grouped
from megamoe.moe.initialization import normal
from megamoe.moe.mixture import Choices, Weights, mix, mix_fetched
from megamoe.moe.precision import at_least_fp32, out_of_autocast
from megamoe.moe.randomness import draw

RESPONSES_AT_ONCE = 8192
"""Tokens whose outputs of one expert are held at a time while all experts are asked."""


class Experts(nn.Module):
    """Expert e is Linear(D -> F), ReLU, Dropout, Linear(F -> D), both with bias.

    Weights start at N(0, init_std^2), biases at 0. Expert e of layer i is drawn from
    (seed, tensor name, i, e) with e counted over all ranks, so it does not depend on who holds it.

    Args:
        n_experts: experts E of the layer over all ranks.
        local: global ids of those held here.
        init_stds: standard deviations of w_in and w_out where they are not init_std.
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        d_expert: int,
        *,
        dropout: float,
        init_std: float,
        seed: int,
        layer: int,
        local: range,
        init_stds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.local = local
        self.dropout = Dropout(dropout, f"layers.{layer}.moe.experts")

        std_in, std_out = init_stds or (init_std, init_std)

        def stacked(name: str, shape: tuple[int, int], std: float) -> nn.Parameter:
            path = f"layers.{layer}.moe.experts.{name}"
            values = torch.empty(len(local), *shape)
            if not values.is_meta:  # where no numbers are wanted, thousands of experts cost nothing
                for place, expert in enumerate(local):
                    values[place] = normal(shape, std, seed, path, expert)
            return nn.Parameter(values)

        self.w_in = stacked("w_in", (d_expert, d_model), std_in)
        self.b_in = nn.Parameter(torch.zeros(len(local), d_expert))
        self.w_out = stacked("w_out", (d_model, d_expert), std_out)
        self.b_out = nn.Parameter(torch.zeros(len(local), d_model))

    def forward(self, arrived: Arrived) -> torch.Tensor:
        """The weighted sum of its experts' outputs for each token, [N, D], those of other ranks left out.

        Args:
            arrived: with weights, and where dropout is active with keys.
        """
        assert arrived.weights_P is not None
        return self._mix(arrived.x_ND, arrived.token_P, arrived, arrived.weights_P)

    def outputs(self, arrived: Arrived) -> torch.Tensor:
        """The output for each choice, [P, D]; zero where it names no expert."""
        copies = Copies.of(arrived.token_P, len(arrived.x_ND))
        x_PD = copies.gather(arrived.x_ND)
        ones_P = torch.ones(len(x_PD), device=x_PD.device)
        return self._mix(x_PD, torch.arange(len(x_PD), device=x_PD.device), arrived, ones_P)

    def _mix(
        self, x_ND: torch.Tensor, row_P: torch.Tensor, arrived: Arrived, weights_P: torch.Tensor
    ) -> torch.Tensor:
        """Choice p is of row row_P[p] of x; who made it, and so how it drops, is as it arrived."""
        choices = Choices.of(row_P, arrived.expert_P, len(self.local))
        if self.dropout.active:
            assert arrived.keys_N is not None, "dropout in training: give RouterContext.token_keys_T"
            keys_P = arrived.keys_N.index_select(0, arrived.token_P).index_select(0, choices.order_P)
            # Each expert draws for itself.
            choices = replace(choices, keys_P=draw(keys_P, choices.expert_P + self.local.start))
        weights_P = weights_P.index_select(0, choices.order_P)
        return self.compute(x_ND, choices, weights_P)

    def compute(self, x_ND: torch.Tensor, choices: Choices, weights_P: torch.Tensor) -> torch.Tensor:
        """The weighted sum over the choices, [N, D]; weights are in the order of the sorted choices."""
        with out_of_autocast(x_ND, *self.weights) as (x_ND, *stacks):
            weights = Weights(*stacks)
            path = choose_path(x_ND, weights.w_in)
            if path is mix and choices.keys_P is None and not torch.is_grad_enabled():
                return mix_fetched(x_ND, choices, weights_P, weights.of)
            return path(x_ND, choices, weights_P, weights, self.dropout)

    def fetch(self, expert: int) -> Weights:
        """The parameters of one of the experts here."""
        return self.weights.of(expert)

    @property
    def weights(self) -> Weights:
        """The stacked parameters."""
        return Weights(self.w_in, self.b_in, self.w_out, self.b_out)

    @torch.no_grad()
    def responses(self, x_ND: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`response` of every local expert's output for every token, [N, E_local] fp32, without dropout.

        Args:
            x_ND: any tokens.
            response: from fp32 outputs [n, D] to one number each.
        """
        scores = []
        for expert in range(len(self.local)):
            w_in, b_in, w_out, b_out = self.fetch(expert)
            score_N = [
                response(at_least_fp32(linear(linear(x, w_in, b_in).relu_(), w_out, b_out)))
                for x in x_ND.split(RESPONSES_AT_ONCE)
            ]
            scores.append(torch.cat(score_N))
        return torch.stack(scores, dim=1)

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        n_local, d_expert, d_model = self.w_in.shape
        return f"{n_local} of {self.n_experts} experts, d_model={d_model}, d_expert={d_expert}"


Compute = Callable[[torch.Tensor, Choices, torch.Tensor, Weights, Dropout], torch.Tensor]


def choose_path(x_ND: torch.Tensor, w_in: torch.Tensor) -> Compute:
    """The fastest way for these tokens; all ways give the same numbers up to rounding."""
    aligned = w_in.shape[1] % 8 == w_in.shape[2] % 8 == 0
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned and hasattr(functional, "grouped_mm"):
        return mix_grouped
    return mix
