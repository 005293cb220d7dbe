"""Tokens to experts and back: the contract, and its one-rank form.

Shapes: T tokens, D model width, K choices per token, N rows, one for each (token, choice) pair that
reaches an expert of this rank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import embedding_bag

from megamoe.moe.precision import at_least_fp32
from megamoe.moe.selection import choices_per_expert


@dataclass(frozen=True)
class Dispatched:
    """Rows for the experts of this rank, and what it takes to undo the way here.

    Attributes:
        rows_ND: inputs, grouped by local expert in rising order.
        counts: rows of each local expert, summing to N; experts without tokens count 0.
        choices: the choices of this rank's tokens.
        plan: private to the exchange that made it.
    """

    rows_ND: torch.Tensor
    counts: list[int]
    choices: "SortedChoices"
    plan: object = None


class Exchange(Protocol):
    """Moves token rows to the ranks that own their experts, and the results back.

    Every rank makes the same calls in the same order, also when it has no rows to send.
    """

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, n_experts: int) -> Dispatched:
        """Send a copy of token t to expert_ids_TK[t, j] for each choice j that is not -1."""
        ...

    def send_along(self, values_T: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Send one number per token, without gradient, the way its copies went.

        Returns:
            [N], row n's number where `dispatched.rows_ND` has row n.
        """
        ...

    def bring_home(self, rows_ND: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Send expert outputs back; they arrive in the order of `dispatched.choices`.

        Returns:
            [N', D], one row for each choice that this rank's tokens made.
        """
        ...

    def to_all(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The tokens of all ranks that share one set of experts, and how many are from each; no gradient."""
        ...

    def from_all(self, scores_NE: torch.Tensor, counts: list[int], n_tokens: int) -> torch.Tensor:
        """What each rank's local experts say of the tokens of `to_all`, back to the tokens' ranks.

        Args:
            scores_NE: a column for each local expert.
            counts: as `to_all` gave them.
            n_tokens: tokens of this rank.

        Returns:
            [n_tokens, E] with all experts.
        """
        ...


class _CopyTokens(torch.autograd.Function):
    """Row n is a copy of token token_N[n].

    The gradient adds a token's rows up in token order; that of plain indexing adds them in any order
    on a GPU, so that two equal runs would differ.
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
class SortedChoices:
    """The choices of T tokens that name an expert, sorted by expert, in token order within one.

    The order of the rows and the order of the tokens are kept side by side: choices count through
    [T, K], rows through the sorted ones.

    Attributes:
        counts: rows of each of the E experts, summing to N.
        token_N: token of row n.
        choice_N: the choices that name an expert, rising.
        row_N: row of each of those.
        first_T: where the choices of token t begin in `choice_N` and `row_N`.
    """

    counts: list[int]
    token_N: torch.Tensor
    choice_N: torch.Tensor
    row_N: torch.Tensor
    first_T: torch.Tensor

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, n_experts: int) -> "SortedChoices":
        """Sort choices by expert; those of -1 are left out."""
        counts = choices_per_expert(expert_ids_TK, n_experts).tolist()
        n_left_out = expert_ids_TK.numel() - sum(counts)
        sorted_N = expert_ids_TK.flatten().argsort(stable=True)[n_left_out:]
        choice_N, row_N = sorted_N.sort()
        kept_T = (expert_ids_TK >= 0).sum(1)
        return cls(counts, sorted_N // expert_ids_TK.shape[1], choice_N, row_N, kept_T.cumsum(0) - kept_T)

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One copy of its token for each row, [N, D]."""
        return _CopyTokens.apply(x_TD, self.token_N, self.row_N, self.first_T)

    def weighted_sum(self, rows_ND: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Each token's rows times their weights, summed in fp32; [T, D] in the type of the rows."""
        wide_ND = at_least_fp32(rows_ND)
        weights_N = weights_TK.flatten().index_select(0, self.choice_N).to(wide_ND.dtype)
        y_TD = embedding_bag(self.row_N, wide_ND, self.first_T, mode="sum", per_sample_weights=weights_N)
        return y_TD.to(rows_ND.dtype)

    def per_choice(self, rows_ND: torch.Tensor, top_k: int) -> torch.Tensor:
        """Each choice's row, [T, K, D] in fp32; zero where a choice names no expert."""
        wide_ND = at_least_fp32(rows_ND)
        flat = wide_ND.new_zeros(len(self.first_T) * top_k, rows_ND.shape[1])
        return flat.index_copy(0, self.choice_N, wide_ND.index_select(0, self.row_N)).unflatten(
            0, (-1, top_k)
        )


class LocalExchange:
    """All experts are here: rows are copies of tokens, sorted by expert, in token order within one."""

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, n_experts: int) -> Dispatched:
        """Group a copy of each chosen token by expert; choices of -1 are left out."""
        choices = SortedChoices.of(expert_ids_TK, n_experts)
        return Dispatched(choices.gather(x_TD), choices.counts, choices)

    def send_along(self, values_T: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Each row's token's number."""
        return values_T.index_select(0, dispatched.choices.token_N)

    def bring_home(self, rows_ND: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """They are at home."""
        return rows_ND

    def to_all(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The tokens."""
        return x_TD.detach(), [len(x_TD)]

    def from_all(self, scores_NE: torch.Tensor, counts: list[int], n_tokens: int) -> torch.Tensor:
        """The scores."""
        return scores_NE
