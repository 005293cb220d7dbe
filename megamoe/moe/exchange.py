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
