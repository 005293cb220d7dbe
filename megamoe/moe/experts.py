"""The experts of one mixture layer: stacked two-layer MLPs, and the ways to compute them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from megamoe.moe.dropout import Dropout
from megamoe.moe.initialization import normal
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.randomness import draw

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

ROW_MULTIPLE = 64
"""16-bit products on a CPU are compiled anew for each row count not seen before, which costs many
times the product; rounding the counts up leaves few."""

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
            return nn.Parameter(torch.stack([normal(shape, std, seed, path, e) for e in local]))

        self.w_in = stacked("w_in", (d_expert, d_model), std_in)
        self.b_in = nn.Parameter(torch.zeros(len(local), d_expert))
        self.w_out = stacked("w_out", (d_model, d_expert), std_out)
        self.b_out = nn.Parameter(torch.zeros(len(local), d_model))

    def forward(
        self, rows_ND: torch.Tensor, counts: list[int], keys_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the local experts to rows grouped by expert, counts[e] of them for local expert e.

        Args:
            keys_N: keys of the rows' tokens, see `randomness.token_keys`; needed when dropout is active.
        """
        compute = choose_path(rows_ND, counts, self.w_in)
        weights = Weights(self.w_in, self.b_in, self.w_out, self.b_out)
        return compute(rows_ND, counts, weights, self._drop(counts, keys_N))

    @torch.no_grad()
    def responses(self, x_ND: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`response` of every local expert's output for every token, [N, E_local] fp32, without dropout.

        Args:
            x_ND: any tokens.
            response: from fp32 outputs [n, D] to one number each.
        """
        weights = Weights(self.w_in, self.b_in, self.w_out, self.b_out)
        scores = []
        for stacks in zip(*(stack.unbind() for stack in weights), strict=True):
            one = Weights(*(tensor[None] for tensor in stacks))
            score_N = [
                response(at_least_fp32(one_by_one(x, [len(x)], one, _keep_all)))
                for x in x_ND.split(RESPONSES_AT_ONCE)
            ]
            scores.append(torch.cat(score_N))
        return torch.stack(scores, dim=1)

    def _drop(self, counts: list[int], keys_N: torch.Tensor | None) -> "Drop":
        """Dropout on hidden units, which each expert draws for itself."""
        if not self.dropout.active:
            return _keep_all
        assert keys_N is not None, "experts with dropout in training: give the keys of the rows' tokens"
        counts_E = torch.tensor(counts, device=keys_N.device)
        experts_E = torch.arange(self.local.start, self.local.stop, device=keys_N.device)
        expert_N = experts_E.repeat_interleave(counts_E, output_size=len(keys_N))
        # Rows that pad the last expert draw from keys too.
        keys_N = functional.pad(draw(keys_N, expert_N), (0, ROW_MULTIPLE))

        def drop(hidden: torch.Tensor, first: int) -> torch.Tensor:
            shape = hidden.shape[:-1]
            return self.dropout(hidden, keys_N[first : first + shape.numel()].view(shape))

        return drop

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        n_local, d_expert, d_model = self.w_in.shape
        return f"{n_local} of {self.n_experts} experts, d_model={d_model}, d_expert={d_expert}"


class Weights(NamedTuple):
    """The stacked parameters of E experts, for the functions that compute them."""

    w_in: torch.Tensor
    b_in: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor


Drop = Callable[[torch.Tensor, int], torch.Tensor]
"""Drops hidden units of consecutive rows, given the number of the first."""


def _keep_all(hidden: torch.Tensor, first: int) -> torch.Tensor:
    return hidden


Compute = Callable[[torch.Tensor, list[int], Weights, Drop], torch.Tensor]


def choose_path(rows_ND: torch.Tensor, counts: list[int], w_in: torch.Tensor) -> Compute:
    """The fastest way for these rows; all ways give the same numbers up to rounding."""
    aligned = w_in.shape[1] % 8 == w_in.shape[2] % 8 == 0
    if rows_ND.is_cuda and rows_ND.dtype == torch.bfloat16 and aligned and hasattr(functional, "grouped_mm"):
        return grouped
    if len(set(counts)) == 1 and (rows_ND.is_cuda or rows_ND.dtype in SIXTEEN_BITS):
        return batched
    return one_by_one


def one_by_one(rows_ND: torch.Tensor, counts: list[int], weights: Weights, drop: Drop) -> torch.Tensor:
    """One pair of matrix products per expert.

    Experts without rows run too, so that their gradient is zero and not missing. Unbinding the stacks
    once spares the backward pass a full-size gradient per expert, which indexing would build.
    """
    multiple = ROW_MULTIPLE if rows_ND.device.type == "cpu" and rows_ND.dtype in SIXTEEN_BITS else 1
    outputs, first = [], 0
    stacks = zip(*(stack.unbind() for stack in weights), strict=True)
    for rows, (w_in, b_in, w_out, b_out) in zip(rows_ND.split(counts), stacks, strict=True):
        missing = -len(rows) % multiple
        padded = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        hidden = drop(functional.linear(padded, w_in, b_in).relu(), first)
        outputs.append(functional.linear(hidden, w_out, b_out)[: len(rows)])
        first += len(rows)
    return torch.cat(outputs)


def batched(rows_ND: torch.Tensor, counts: list[int], weights: Weights, drop: Drop) -> torch.Tensor:
    """Batched matrix products, for experts with equally many rows (as with k = E)."""
    rows_END = rows_ND.unflatten(0, (len(counts), counts[0]))
    hidden = torch.baddbmm(weights.b_in[:, None], rows_END, weights.w_in.mT).relu()
    return torch.baddbmm(weights.b_out[:, None], drop(hidden, 0), weights.w_out.mT).flatten(0, 1)


def grouped(rows_ND: torch.Tensor, counts: list[int], weights: Weights, drop: Drop) -> torch.Tensor:
    """Grouped matrix products, one kernel for all experts.

    The biases are added through a one-hot product, whose gradient is again a product: exact to the
    accumulator and in a fixed order, which adding rows of a gathered bias up again would not be.
    """
    counts_E = torch.tensor(counts, device=rows_ND.device)
    ends_E = counts_E.cumsum(0).int()
    experts_E = torch.arange(len(counts), device=rows_ND.device)
    owner_N = experts_E.repeat_interleave(counts_E, output_size=len(rows_ND))
    owner_NE = functional.one_hot(owner_N, len(counts)).to(rows_ND.dtype)
    hidden = functional.grouped_mm(rows_ND, weights.w_in.mT, offs=ends_E) + owner_NE @ weights.b_in
    dropped = drop(hidden.relu(), 0)
    return functional.grouped_mm(dropped, weights.w_out.mT, offs=ends_E) + owner_NE @ weights.b_out
