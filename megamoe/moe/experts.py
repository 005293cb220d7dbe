"""The experts of one mixture layer: stacked two-layer MLPs, and the ways to compute them."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import dropout, linear

from megamoe.moe.initialization import normal


class Experts(nn.Module):
    """Expert e is Linear(D -> F), ReLU, Dropout, Linear(F -> D), both with bias.

    Weights start at N(0, init_std^2), biases at 0. Expert e of layer i is drawn from
    (seed, tensor name, i, e) with e counted over all ranks, so it does not depend on who holds it.

    Args:
        n_experts: experts E of the layer over all ranks.
        local: global ids of those held here.
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
    ) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.local = local
        self.dropout = dropout

        def stacked(name: str, shape: tuple[int, int]) -> nn.Parameter:
            path = f"layers.{layer}.moe.experts.{name}"
            return nn.Parameter(torch.stack([normal(shape, init_std, seed, path, e) for e in local]))

        self.w_in = stacked("w_in", (d_expert, d_model))
        self.b_in = nn.Parameter(torch.zeros(len(local), d_expert))
        self.w_out = stacked("w_out", (d_model, d_expert))
        self.b_out = nn.Parameter(torch.zeros(len(local), d_model))

    def forward(self, rows_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Apply the local experts to rows grouped by expert, counts[e] of them for local expert e."""
        return torch.cat(list(self._one_by_one(rows_ND, counts)))

    def _one_by_one(self, rows_ND: torch.Tensor, counts: list[int]) -> Iterator[torch.Tensor]:
        # Experts without rows run too, so that their gradient is zero and not missing. Unbinding once
        # spares the backward pass a full-size gradient per expert, which indexing would build.
        weights = zip(
            self.w_in.unbind(), self.b_in.unbind(), self.w_out.unbind(), self.b_out.unbind(), strict=True
        )
        for rows, (w_in, b_in, w_out, b_out) in zip(rows_ND.split(counts), weights, strict=True):
            hidden = dropout(linear(rows, w_in, b_in).relu(), self.dropout, self.training)
            yield linear(hidden, w_out, b_out)
