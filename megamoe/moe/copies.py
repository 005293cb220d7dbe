"""Tokens copied into rows and rows summed into tokens, with gradients in a fixed order.

Shapes: T tokens, N rows, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding_bag

from megamoe.moe.precision import at_least_fp32


class _Gather(torch.autograd.Function):
    """Row n is a copy of token token_N[n].

    The gradient adds a token's rows up in their order; that of plain indexing adds them in any order on a
    GPU, so that two equal runs would differ.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_N: torch.Tensor, row_N: torch.Tensor, first_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_N, first_T)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row_N, first_T = ctx.saved_tensors
        return embedding_bag(row_N, gradient_ND, first_T, mode="sum"), None, None, None


@dataclass(frozen=True)
class Copies:
    """Which token each of N rows belongs to, and the same the other way round.

    Attributes:
        token_N: token of row n.
        row_N: the rows by token, in their order within one.
        first_T: where the rows of token t begin in `row_N`.
    """

    token_N: torch.Tensor
    row_N: torch.Tensor
    first_T: torch.Tensor

    @classmethod
    def of(cls, token_N: torch.Tensor, n_tokens: int) -> "Copies":
        """The rows of `n_tokens` tokens, of which some may have none."""
        rows_T = token_N.new_zeros(n_tokens).scatter_add(0, token_N, torch.ones_like(token_N))
        return cls(token_N, token_N.argsort(stable=True), rows_T.cumsum(0) - rows_T)

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """A copy of its token for each row, [N, D]."""
        return _Gather.apply(x_TD, self.token_N, self.row_N, self.first_T)

    def sum(self, rows_ND: torch.Tensor, weights_N: torch.Tensor | None = None) -> torch.Tensor:
        """Each token's rows, times their weights if given, summed in fp32; [T, D] in the type of the rows."""
        wide_ND = at_least_fp32(rows_ND)
        if weights_N is not None:
            weights_N = weights_N.index_select(0, self.row_N).to(wide_ND.dtype)
        summed_TD = embedding_bag(self.row_N, wide_ND, self.first_T, mode="sum", per_sample_weights=weights_N)
        return summed_TD.to(rows_ND.dtype)
