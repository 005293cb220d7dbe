"""Tokens to the ranks that own their experts and back, by all-to-all.

Shapes: T tokens, D model width, K choices per token, E experts, R expert-parallel ranks, N rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamoe.moe.exchange import Dispatched, SortedChoices


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
class _Plan:
    """How rows travelled: by `send` from home, by `receive` and `arrival_N` to the experts."""

    send: list[int]
    receive: list[int]
    arrival_N: torch.Tensor


class AllToAllExchange:
    """Rank r of `group` owns experts r * E/R to (r + 1) * E/R - 1; rows travel to them and back.

    No row is padded or dropped. Each dispatch exchanges the counts once, E integers per rank, and the
    rows once; `bring_home` exchanges the rows once more, and `send_along` a number for each. All ranks of
    the group must call in step, also those without a row to send: an empty message is still a message.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.n_ranks = dist.get_world_size(group)

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, n_experts: int) -> Dispatched:
        """Send token copies to the owners of their experts; choices of -1 go nowhere."""
        choices = SortedChoices.of(expert_ids_TK, n_experts)
        sent_RE = torch.tensor(choices.counts, device=x_TD.device).view(self.n_ranks, -1)
        received_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        # One copy to the host serves all three: each is a wait for the GPU.
        received = received_RE.tolist()
        counts = [sum(rows_R) for rows_R in zip(*received, strict=True)]
        receive = [sum(rows_E) for rows_E in received]
        n_local = n_experts // self.n_ranks
        send = [sum(choices.counts[first : first + n_local]) for first in range(0, n_experts, n_local)]
        arrived_ND = _AllToAll.apply(choices.gather(x_TD), send, receive, self.group)
        arrival_N = _by_expert(received_RE, sum(receive))
        plan = _Plan(send, receive, arrival_N)
        return Dispatched(arrived_ND.index_select(0, arrival_N), counts, choices, plan)

    def send_along(self, values_T: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Exchange one number per row more."""
        plan = dispatched.plan
        assert isinstance(plan, _Plan)
        sent_N = values_T.index_select(0, dispatched.choices.token_N)
        return _exchange(sent_N, plan.send, plan.receive, self.group).index_select(0, plan.arrival_N)

    def bring_home(self, rows_ND: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Send each expert output back to the rank of its token."""
        plan = dispatched.plan
        assert isinstance(plan, _Plan)
        by_rank_ND = rows_ND.index_select(0, plan.arrival_N.argsort())
        home: torch.Tensor = _AllToAll.apply(by_rank_ND, plan.receive, plan.send, self.group)
        return home

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


def _by_expert(received_RE: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The order that turns rows sorted by (sender, local expert) into rows sorted by local expert."""
    n_ranks, n_local = received_RE.shape
    expert_N = torch.arange(n_local, device=received_RE.device).repeat(n_ranks)
    return expert_N.repeat_interleave(received_RE.flatten(), output_size=n_rows).argsort(stable=True)
