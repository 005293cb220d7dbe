"""Tokens to experts and back: the contract, and its one-rank form.

Shapes: T tokens, D model width, K choices per token, N rows, one for each (token, choice) pair that
reaches an expert of this rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Dispatched:
    """Rows for the experts of this rank, and what `Exchange.combine` needs to undo the way here.

    Attributes:
        rows_ND: inputs, grouped by local expert in rising order.
        counts: rows of each local expert, summing to N; experts without tokens count 0.
        plan: private to the exchange that made it.
    """

    rows_ND: torch.Tensor
    counts: list[int]
    plan: object


class Exchange(Protocol):
    """Moves token rows to the ranks that own their experts, and the results back.

    Every rank makes the same calls in the same order, also when it has no rows to send.
    """

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, n_experts: int) -> Dispatched:
        """Send a copy of token t to expert_ids_TK[t, j] for each choice j that is not -1."""
        ...

    def combine(
        self, rows_ND: torch.Tensor, weights_TK: torch.Tensor, dispatched: Dispatched
    ) -> torch.Tensor:
        """Bring expert outputs home: y_t = sum_j weights_TK[t, j] * output(t, j), summed in fp32.

        Returns:
            [T, D] in the type of `rows_ND`.
        """
        ...


@dataclass(frozen=True)
class SortedChoices:
    """The choices of T tokens that name an expert, sorted by expert, in token order within one.

    Attributes:
        order_N: which of the T * K choices row n is.
        counts: rows of each of the E experts, summing to N.
        n_tokens: T.
        n_choices: K.
    """

    order_N: torch.Tensor
    counts: list[int]
    n_tokens: int
    n_choices: int

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, n_experts: int) -> "SortedChoices":
        """Sort choices by expert; those of -1 are left out."""
        ids_N = expert_ids_TK.flatten()
        n_dropped, *counts = torch.bincount(ids_N + 1, minlength=n_experts + 1).tolist()
        return cls(ids_N.argsort(stable=True)[n_dropped:], counts, *expert_ids_TK.shape)

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One copy of its token for each row, [N, D]."""
        return x_TD.index_select(0, self.order_N // self.n_choices)

    def weighted_sum(self, rows_ND: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Each token's rows times their weights, summed in fp32; [T, D] in the type of the rows."""
        weighted_ND = rows_ND.float() * weights_TK.flatten()[self.order_N, None]
        y_TD = weighted_ND.new_zeros(self.n_tokens, rows_ND.shape[1])
        return y_TD.index_add(0, self.order_N // self.n_choices, weighted_ND).to(rows_ND.dtype)


class LocalExchange:
    """All experts are here: rows are copies of tokens, sorted by expert, in token order within one."""

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, n_experts: int) -> Dispatched:
        """Group a copy of each chosen token by expert; choices of -1 are left out."""
        choices = SortedChoices.of(expert_ids_TK, n_experts)
        return Dispatched(choices.gather(x_TD), choices.counts, choices)

    def combine(
        self, rows_ND: torch.Tensor, weights_TK: torch.Tensor, dispatched: Dispatched
    ) -> torch.Tensor:
        """Sum each token's weighted expert outputs in fp32."""
        choices = dispatched.plan
        assert isinstance(choices, SortedChoices)
        return choices.weighted_sum(rows_ND, weights_TK)
