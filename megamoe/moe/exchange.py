"""Tokens to the ranks that own their experts and back: the contract, and its one-rank form.

Shapes: T tokens of this rank, K choices of each, D model width, E experts; N tokens that have arrived at
this rank's experts, P choices that they made among these.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from megamoe.moe.precision import at_least_fp32


@dataclass(frozen=True)
class Arrived:
    """Tokens at the ranks of their experts, each once however many of these it goes to.

    Attributes:
        x_ND: the tokens.
        token_P: which of the N tokens made choice p.
        expert_P: its expert, counted from the first of this rank; as many as there are here for none.
        weights_P: its weight, in fp32 or wider; None where outputs are not to be weighted.
        keys_N: keys of the tokens for dropout; None where nothing is dropped.
        way_home: private to the exchange.
    """

    x_ND: torch.Tensor
    token_P: torch.Tensor
    expert_P: torch.Tensor
    weights_P: torch.Tensor | None
    keys_N: torch.Tensor | None
    way_home: object


class Exchange(Protocol):
    """Moves tokens to the ranks that own their experts, and the results back.

    Every rank makes the same calls in the same order, also when it has nothing to send.
    """

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        n_experts: int,
        keys_T: torch.Tensor | None,
    ) -> Arrived:
        """Send each token to every rank that owns one of its experts; choices of -1 go nowhere."""
        ...

    def bring_home(self, y_ND: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """What the tokens' experts on all ranks made of them, summed in fp32; [T, D] in the type of y."""
        ...

    def bring_choices_home(self, rows_PD: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """A row for each choice of this rank's tokens, [T, K, D] in fp32; zero where it names no expert."""
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


class LocalExchange:
    """All experts are here, and so are the tokens."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        n_experts: int,
        keys_T: torch.Tensor | None,
    ) -> Arrived:
        """Nothing moves."""
        n_tokens, top_k = expert_ids_TK.shape
        token_P = torch.arange(n_tokens, device=x_TD.device).repeat_interleave(top_k)
        ids_P = expert_ids_TK.flatten()
        expert_P = ids_P.where(ids_P >= 0, n_experts)
        weights_P = None if weights_TK is None else weights_TK.flatten()
        return Arrived(x_TD, token_P, expert_P, weights_P, keys_T, way_home=expert_ids_TK.shape)

    def bring_home(self, y_ND: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """They are at home."""
        return y_ND

    def bring_choices_home(self, rows_PD: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """They are at home."""
        assert isinstance(arrived.way_home, tuple)
        return at_least_fp32(rows_PD).unflatten(0, arrived.way_home)

    def to_all(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The tokens."""
        return x_TD.detach(), [len(x_TD)]

    def from_all(self, scores_NE: torch.Tensor, counts: list[int], n_tokens: int) -> torch.Tensor:
        """The scores."""
        return scores_NE
