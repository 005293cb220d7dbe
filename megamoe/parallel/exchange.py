"""Tokens to the ranks that own their experts and back, by all-to-all.

Shapes: T tokens of this rank, K choices of each, D model width, E experts, R expert-parallel ranks; N copies
of tokens on their way, P choices; 2 numbers of each rank, those of its copies and its choices.
"""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class _Order:
    """Choices and copies of this rank's tokens in the order in which they are sent: by rank.

    Attributes:
        choice_P: place in [T, K] of each choice that names an expert.
        code_P: its copy's place among those for the rank, times E / R, plus its expert's place there.
        copies: of the tokens.
        counts_R2: how many copies and choices go to each rank.
    """

    choice_P: torch.Tensor
    code_P: torch.Tensor
    copies: Copies
    counts_R2: torch.Tensor

    @classmethod
    def of(cls, expert_ids_TK: torch.Tensor, n_local: int, n_ranks: int) -> "_Order":
        """A token goes to every rank that owns one of its experts, once."""
        n_tokens, top_k = expert_ids_TK.shape
        rank_TK = expert_ids_TK.div(n_local, rounding_mode="floor")  # that of -1 is -1
        goes_TR = torch.zeros(n_tokens, n_ranks + 1, dtype=torch.bool, device=expert_ids_TK.device)
        goes_RT = goes_TR.scatter_(1, rank_TK + 1, True)[:, 1:].t()
        place_RT = goes_RT.cumsum(1) - 1
        rank_P, choice_P = rank_TK.flatten().sort(stable=True)
        choices_R = (rank_TK.flatten() == torch.arange(n_ranks, device=rank_TK.device)[:, None]).sum(1)
        named = rank_P >= 0
        rank_P, choice_P = rank_P[named], choice_P[named]
        code_P = place_RT[rank_P, choice_P // top_k] * n_local + expert_ids_TK.flatten()[choice_P] % n_local
        copies = Copies.of(goes_RT.nonzero()[:, 1], n_tokens)
        return cls(choice_P, code_P, copies, torch.stack([goes_RT.sum(1), choices_R], dim=1))


@dataclass(frozen=True)
class _WayHome:
    """How a dispatch travelled: numbers of copies and of choices to and from each rank."""

    order: _Order
    shape: torch.Size
    sent_copies: list[int]
    received_copies: list[int]
    sent_choices: list[int]
    received_choices: list[int]


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
        order = _Order.of(expert_ids_TK, n_local, self.n_ranks)
        way = self._agree(order, expert_ids_TK.shape)
        copies = (way.sent_copies, way.received_copies, self.group)
        choices = (way.sent_choices, way.received_choices, self.group)
        x_ND = _AllToAll.apply(order.copies.gather(x_TD), *copies)
        code_P = _exchange(order.code_P, *choices)
        weights_P = keys_N = None
        if weights_TK is not None:
            weights_P = _AllToAll.apply(weights_TK.flatten().index_select(0, order.choice_P), *choices)
        if keys_T is not None:
            keys_N = _exchange(keys_T.index_select(0, order.copies.token_N), *copies)
        first_R = torch.tensor(way.received_copies).cumsum(0) - torch.tensor(way.received_copies)
        sender_P = torch.tensor(way.received_choices)
        first_P = first_R.repeat_interleave(sender_P).to(x_TD.device)
        return Arrived(x_ND, first_P + code_P // n_local, code_P % n_local, weights_P, keys_N, way)

    def _agree(self, order: _Order, shape: torch.Size) -> _WayHome:
        received_R2 = torch.empty_like(order.counts_R2)
        dist.all_to_all_single(received_R2, order.counts_R2, group=self.group)
        # One copy to the host serves all: each is a wait for the GPU.
        counts = torch.cat([order.counts_R2, received_R2], dim=1).t().tolist()
        return _WayHome(order, shape, counts[0], counts[2], counts[1], counts[3])

    def bring_home(self, y_ND: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """Send what this rank's experts made of the tokens back, and sum what all ranks' made of ours."""
        way = arrived.way_home
        assert isinstance(way, _WayHome)
        home_ND = _AllToAll.apply(y_ND, way.received_copies, way.sent_copies, self.group)
        return way.order.copies.sum(home_ND)

    def bring_choices_home(self, rows_PD: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        """Send each choice's row back."""
        way = arrived.way_home
        assert isinstance(way, _WayHome)
        home_PD = at_least_fp32(_AllToAll.apply(rows_PD, way.received_choices, way.sent_choices, self.group))
        flat = home_PD.new_zeros(way.shape.numel(), home_PD.shape[1])
        return flat.index_copy(0, way.order.choice_P, home_PD).unflatten(0, way.shape)

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
