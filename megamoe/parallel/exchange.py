"""Tokens to the ranks that own their experts and back, by all-to-all.

Shapes: T tokens of this rank, K choices of each, D model width, E experts, R expert-parallel ranks; N copies
of tokens on their way, P choices, Q = T K of them before those of no expert are left out; 2 numbers of each
rank, those of its copies and its choices.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megamoe.moe.copies import Copies
from megamoe.moe.exchange import Arrived
from megamoe.moe.precision import at_least_fp32


class _AllToAll(torch.autograd.Function):
    """Send consecutive rows to rank 0, 1, ...; the gradient makes the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.way_back = (receive, send, group)
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(gradient, *ctx.way_back), None, None, None


def _exchange(
    rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class _Traffic(NamedTuple):
    """How many copies and choices go to each rank and come from each."""

    sent_copies: list[int]
    sent_choices: list[int]
    received_copies: list[int]
    received_choices: list[int]


@dataclass(frozen=True)
class Order:
    """Choices of this rank's tokens in the order in which they are sent: by rank, those of no expert first.

    Time and memory grow with the choices, and with the ranks only as their numbers do.

    Attributes:
        choice_Q: place in [T, K] of each.
        code_Q: its copy's place among those for the rank, times E / R, plus its expert's place there.
        leads_Q: 1 for the first choice of each copy, else 0.
        sent_R2: copies and choices for each rank.
    """

    choice_Q: torch.Tensor
    code_Q: torch.Tensor
    leads_Q: torch.Tensor
    sent_R2: torch.Tensor

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, n_local: int, n_ranks: int) -> "Order":
        """Sort the choices; `n_local` experts are on each rank, and a choice of -1 goes nowhere."""
        rank_TK = expert_ids_TK.div(n_local, rounding_mode="floor")  # that of -1 is -1
        rank_Q, choice_Q = rank_TK.flatten().sort(stable=True)
        token_Q = choice_Q // expert_ids_TK.shape[1]
        # A token's choices of one rank stand side by side.
        leads_Q = torch.ones_like(rank_Q)
        leads_Q[1:] = (rank_Q[1:] != rank_Q[:-1]) | (token_Q[1:] != token_Q[:-1])
        bin_Q = rank_Q + 1  # the first is that of no expert
        copies_B, choices_B = (
            rank_Q.new_zeros(n_ranks + 1).scatter_add(0, bin_Q, values_Q)
            for values_Q in (leads_Q, torch.ones_like(leads_Q))
        )
        place_Q = leads_Q.cumsum(0) - 1 - (copies_B.cumsum(0) - copies_B)[bin_Q]
        code_Q = place_Q * n_local + expert_ids_TK.flatten()[choice_Q] % n_local
        return cls(choice_Q, code_Q, leads_Q, torch.stack([copies_B, choices_B], dim=1)[1:])

    def without_unnamed(self, n_choices: int) -> "Order":
        """The last `n_choices`, which name an expert.

        How many there are is known already; to find out, as indexing with a mask does, is a wait.
        """
        first = len(self.choice_Q) - n_choices
        return Order(self.choice_Q[first:], self.code_Q[first:], self.leads_Q[first:], self.sent_R2)

    def copies(self, n_copies: int, n_tokens: int, top_k: int) -> Copies:
        """The copies that are sent."""
        token_Q = self.choice_Q // top_k
        token_N = token_Q.new_empty(n_copies).scatter_(0, self.leads_Q.cumsum(0) - 1, token_Q)
        return Copies.of(token_N, n_tokens)


@dataclass(frozen=True)
class _WayHome:
    """How a dispatch travelled.

    Attributes:
        choice_P: place in [T, K] of each choice that was sent.
        copies: of the tokens.
    """

    choice_P: torch.Tensor
    copies: Copies
    shape: torch.Size
    traffic: _Traffic


class AllToAllExchange:
    """Rank r of `group` owns experts r * E/R to (r + 1) * E/R - 1; tokens travel to them and back.

    A token goes once to each rank that owns one of its experts, and their weighted sum comes back: nothing
    is sent twice, padded or dropped. A dispatch exchanges the numbers of copies and choices once, then
    copies, weights, codes of the choices, and keys. All ranks of the group must call in step, also those
    without a token to send: an empty message is still a message.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.n_ranks = dist.get_world_size(group)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor | None,
        n_experts: int,
        keys_T: torch.Tensor | None,
    ) -> Arrived:
        """Send tokens to the owners of their experts; choices of -1 go nowhere."""
        n_local = n_experts // self.n_ranks
        order = Order.of(expert_ids_TK, n_local, self.n_ranks)
        received_R2, traffic = self._agree(order.sent_R2)
        order = order.without_unnamed(sum(traffic.sent_choices))
        sent = order.copies(sum(traffic.sent_copies), *expert_ids_TK.shape)
        copies = (traffic.sent_copies, traffic.received_copies, self.group)
        choices = (traffic.sent_choices, traffic.received_choices, self.group)
        x_ND = _AllToAll.apply(sent.gather(x_TD), *copies)
        code_P = _exchange(order.code_Q, *choices)
        weights_P = keys_N = None
        if weights_TK is not None:
            weights_P = _AllToAll.apply(weights_TK.flatten().index_select(0, order.choice_Q), *choices)
        if keys_T is not None:
            keys_N = _exchange(keys_T.index_select(0, sent.token_N), *copies)
        copies_R, choices_R = received_R2.unbind(1)
        first_P = (copies_R.cumsum(0) - copies_R).repeat_interleave(choices_R, output_size=len(code_P))
        way = _WayHome(order.choice_Q, sent, expert_ids_TK.shape, traffic)
        return Arrived(x_ND, first_P + code_P // n_local, code_P % n_local, weights_P, keys_N, way)

    def _agree(self, sent_R2: torch.Tensor) -> tuple[torch.Tensor, _Traffic]:
        """The numbers of copies and of choices that come from each rank, and all numbers on the host."""
        received_R2 = torch.empty_like(sent_R2)
        dist.all_to_all_single(received_R2, sent_R2, group=self.group)
        # One copy to the host serves all: it is the one wait for the GPU of a dispatch.
        return received_R2, _Traffic(*torch.cat([sent_R2, received_R2], dim=1).t().tolist())

    def bring_home(self, y_ND: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """Send what this rank's experts made of the tokens back, and sum what all ranks' made of ours."""
        way = arrived.way_home
        assert isinstance(way, _WayHome)
        traffic = way.traffic
        home_ND = _AllToAll.apply(y_ND, traffic.received_copies, traffic.sent_copies, self.group)
        return way.copies.sum(home_ND)

    def bring_choices_home(self, rows_PD: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """Send each choice's row back."""
        way = arrived.way_home
        assert isinstance(way, _WayHome)
        traffic = way.traffic
        home_PD = _AllToAll.apply(rows_PD, traffic.received_choices, traffic.sent_choices, self.group)
        home_PD = at_least_fp32(home_PD)
        flat = home_PD.new_zeros(way.shape.numel(), home_PD.shape[1])
        return flat.index_copy(0, way.choice_P, home_PD).unflatten(0, way.shape)

    def to_all(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Send every token to every rank once, which is less than to every expert."""
        count = torch.tensor([len(x_TD)], device=x_TD.device)
        counts_R = count.new_empty(self.n_ranks)
        dist.all_gather_into_tensor(counts_R, count, group=self.group)
        counts = counts_R.tolist()
        copies_ND = x_TD.detach().repeat(self.n_ranks, 1)
        return _exchange(copies_ND, [len(x_TD)] * self.n_ranks, counts, self.group), counts

    def from_all(self, scores_NE: torch.Tensor, counts: list[int], n_tokens: int) -> torch.Tensor:
        """Send each rank what the local experts say of its tokens; all ranks' experts side by side."""
        scores_RTE = _exchange(scores_NE, counts, [n_tokens] * self.n_ranks, self.group)
        return scores_RTE.view(self.n_ranks, n_tokens, -1).transpose(0, 1).flatten(1)
