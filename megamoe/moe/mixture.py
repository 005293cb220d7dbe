"""Weighted sums of experts' outputs, computed expert by expert.

With h_p = dropout(relu(W_in x_p + b_in)) for choice p of token t(p) and expert e(p), whose weight is g_p,

    y_t = sum of g_p (W_out h_p + b_out) over the choices p of t

As one function of autograd, because the parts would keep what can be told from two things, the tokens and
the h_p: rows are gathered again; a unit of h_p is above 0 exactly where the ReLU passed it and dropout
kept it; and with u_p = W_out^T dy_t, the gradient of g_p is u_p . h_p + b_out . dy_t.

Shapes: N tokens, P choices, D model width, F hidden width, E experts here; n choices of one expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megamoe import kernels
from megamoe.moe.dropout import Dropout, drop_, dropped_levels, keep_mask, rescale
from megamoe.moe.randomness import at_site

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

ROW_MULTIPLE = 64
"""16-bit products on a CPU are compiled anew for each row count not seen before, which costs many
times the product; rounding the counts up leaves few."""


class Weights(NamedTuple):
    """The stacked parameters of E experts, for the functions that compute them; or those of one expert."""

    w_in: torch.Tensor
    b_in: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor

    def of(self, expert: int) -> "Weights":
        """Those of one of the stacked experts."""
        return Weights(*(stack[expert] for stack in self))


@dataclass(frozen=True)
class Choices:
    """P choices sorted by expert, those of none last.

    Attributes:
        order_P: where the choices stood before.
        token_P: their tokens.
        expert_P: their experts; E for none.
        keys_P: keys for dropout; None where nothing is dropped.
        counts_E: choices of each expert.
    """

    order_P: torch.Tensor
    token_P: torch.Tensor
    expert_P: torch.Tensor
    keys_P: torch.Tensor | None
    counts_E: torch.Tensor

    @classmethod
    def of(cls, token_P: torch.Tensor, expert_P: torch.Tensor, n_experts: int) -> "Choices":
        """Sort; choices of one expert keep their order."""
        sorted_P, order_P = expert_P.sort(stable=True)
        counts = sorted_P.new_zeros(n_experts + 1).scatter_add(0, sorted_P, torch.ones_like(sorted_P))
        return cls(order_P, token_P.index_select(0, order_P), sorted_P, None, counts[:n_experts])


def mix(
    x_ND: torch.Tensor,
    choices: Choices,
    weights_P: torch.Tensor,
    weights: Weights,
    dropout: Dropout,
) -> torch.Tensor:
    """y [N, D] in the type of x, summed in fp32 or wider.

    Args:
        weights_P: g, in the order of the sorted choices.
        dropout: on hidden units; drawn where `choices` has keys.
    """
    y_ND: torch.Tensor = _Mixture.apply(x_ND, weights_P, *weights, choices, dropout)
    return y_ND


@torch.no_grad()
def mix_fetched(
    x_ND: torch.Tensor,
    choices: Choices,
    weights_P: torch.Tensor,
    fetch: Callable[[int], Weights],
) -> torch.Tensor:
    """`mix` bit for bit, without gradient and dropout, of experts that need not be in memory together.

    Experts without choices cost nothing, which counts where few tokens are read at once.

    Args:
        fetch: gives the parameters of an expert, which are used before the next call. It is asked for those
            that have choices alone, in rising order.
    """
    y_ND = _wide_zeros(x_ND)
    for one in _each(choices, x_ND):
        if one.count:
            _, rows_nD = _outputs(one, x_ND, fetch(one.expert), choices, None)
            one.add_(y_ND, rows_nD, weights_P[one.where].to(y_ND.dtype))
    return y_ND.to(x_ND.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weights_P: torch.Tensor, *rest: Any) -> torch.Tensor:
        *stacks, choices, dropout = rest
        y_ND = _wide_zeros(x_ND)
        hiddens = []
        for one in _each(choices, x_ND):
            hidden_nF, rows_nD = _outputs(one, x_ND, Weights(*stacks).of(one.expert), choices, dropout)
            one.add_(y_ND, rows_nD, weights_P[one.where].to(y_ND.dtype))
            hiddens.append(hidden_nF)
        ctx.save_for_backward(x_ND, weights_P, *stacks, *hiddens)
        ctx.choices, ctx.rescale = choices, 1.0 if choices.keys_P is None else rescale(dropout.p)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, weights_P, w_in, b_in, w_out, b_out, *hiddens = ctx.saved_tensors
        choices: Choices = ctx.choices
        dx_ND, dweights_P = _wide_zeros(x_ND), torch.zeros_like(weights_P)
        dw_in, db_in, dw_out, db_out = (torch.empty_like(stack) for stack in (w_in, b_in, w_out, b_out))
        dy_ND = dy_ND.contiguous()
        # Of all experts at once: a product of one matrix and one vector is slow in 16 bits.
        bias_NE = dy_ND.to(dx_ND.dtype) @ b_out.to(dx_ND.dtype).t()
        for one, hidden_nF in zip(_each(choices, x_ND), hiddens, strict=True):
            e = one.expert
            dy_nD = one.take(dy_ND)
            dhidden_nF = dy_nD @ w_out[e]
            weight_n = weights_P[one.where].to(dx_ND.dtype)
            dhidden_nF, dots_n = _hidden_backward(dhidden_nF, hidden_nF, weight_n, ctx.rescale)
            dweights_P[one.where] = dots_n + bias_NE[:, e].index_select(0, one.token_n)
            dy_nD = dy_nD * _fill_up(weight_n[:, None], len(dy_nD)).to(dy_nD.dtype)
            torch.mm(dy_nD.t(), hidden_nF, out=dw_out[e])
            torch.sum(dy_nD, 0, out=db_out[e])
            torch.mm(dhidden_nF.t(), one.take(x_ND), out=dw_in[e])
            torch.sum(dhidden_nF, 0, out=db_in[e])
            one.add_(dx_ND, dhidden_nF @ w_in[e])
        return dx_ND.to(x_ND.dtype), dweights_P, dw_in, db_in, dw_out, db_out, None, None


@dataclass(frozen=True)
class _One:
    """The choices of one expert.

    Attributes:
        where: their places among the sorted ones.
        token_n: their tokens.
        all_tokens: they are all tokens, in order, so that nothing needs to be gathered.
        n_rows: count of rows to compute.
    """

    expert: int
    where: slice
    token_n: torch.Tensor
    all_tokens: bool
    n_rows: int

    @property
    def count(self) -> int:
        return len(self.token_n)

    def take(self, values_ND: torch.Tensor) -> torch.Tensor:
        """The tokens' rows, then rows of zeros up to `n_rows`."""
        if self.all_tokens and self.n_rows == self.count:
            return values_ND
        rows_nD = values_ND.new_empty(self.n_rows, values_ND.shape[1])
        torch.index_select(values_ND, 0, self.token_n, out=rows_nD[: self.count])
        rows_nD[self.count :].zero_()
        return rows_nD

    def add_(
        self, values_ND: torch.Tensor, rows_nD: torch.Tensor, weight_n: torch.Tensor | None = None
    ) -> None:
        """Add the rows, times their weights if given, to their tokens'; those from `count` on are padding."""
        if kernels.take(values_ND) and kernels.take(rows_nD):
            torch.ops.megamoe.add_weighted_rows_(values_ND, self.token_n, rows_nD, weight_n)
            return
        rows_nD = rows_nD[: self.count].to(values_ND.dtype)
        if weight_n is not None:
            rows_nD.mul_(weight_n[:, None])
        if self.all_tokens:
            values_ND.add_(rows_nD)
        else:
            values_ND.index_add_(0, self.token_n, rows_nD)


def _outputs(
    one: _One, x_ND: torch.Tensor, weights: Weights, choices: Choices, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [n, F] and W_out h + b_out [n, D] of the choices of one expert, whose parameters are `weights`."""
    w_in, b_in, w_out, b_out = weights
    hidden_nF = torch.addmm(b_in, one.take(x_ND), w_in.t())
    if dropout is None or choices.keys_P is None:
        hidden_nF.relu_()
    else:
        _relu_drop_(hidden_nF, at_site(choices.keys_P[one.where], dropout.site), dropout.p)
    return hidden_nF, torch.addmm(b_out, hidden_nF, w_out.t())


def _relu_drop_(x_nF: torch.Tensor, keys_n: torch.Tensor, p: float) -> None:
    """ReLU and dropout in place; rows without keys are padding."""
    if kernels.take(x_nF):
        torch.ops.megamoe.relu_drop_(x_nF, keys_n, dropped_levels(p), rescale(p))
        return
    drop_(x_nF.relu_()[: len(keys_n)], keep_mask(keys_n, x_nF.shape[1], p), p)


def _hidden_backward(
    d_nF: torch.Tensor, hidden_nF: torch.Tensor, weight_n: torch.Tensor, gain: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients before dropout and ReLU, from u as the head of this file calls it; and u_p . h_p.

    Rows without weights are padding. `d_nF` may be written to.
    """
    if kernels.take(d_nF):
        return d_nF, torch.ops.megamoe.hidden_backward_(d_nF, hidden_nF, weight_n, gain)
    count = len(weight_n)
    dots_n = (d_nF[:count] * hidden_nF[:count]).sum(-1, dtype=weight_n.dtype)
    d_nF.mul_((_fill_up(weight_n[:, None], len(d_nF)) * gain).to(d_nF.dtype))
    return torch.ops.aten.threshold_backward(d_nF, hidden_nF, 0), dots_n


def _each(choices: Choices, x_ND: torch.Tensor) -> Iterator[_One]:
    """The experts in turn, also those that nobody has chosen."""
    multiple = ROW_MULTIPLE if x_ND.device.type == "cpu" and x_ND.dtype in SIXTEEN_BITS else 1
    first = 0
    for expert, count in enumerate(choices.counts_E.tolist()):
        where = slice(first, first + count)
        token_n = choices.token_P[where]
        all_tokens = count == len(x_ND) and torch.equal(token_n, torch.arange(count, device=token_n.device))
        yield _One(expert, where, token_n, all_tokens, count + -count % multiple)
        first += count


def _wide_zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _fill_up(rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Rows of zeros behind `rows`, up to `n_rows`."""
    return torch.nn.functional.pad(rows, (0, 0, 0, n_rows - len(rows)))
