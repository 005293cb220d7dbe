"""fastmoe's algorithm in plain torch, written anew: the package itself needs CUDA.

As published (He et al., "FastMoE: A Fast Mixture-of-Expert Training System", arXiv 2103.13262) and as the
published HyperRouter runs it: count the rows of each expert, sort choices by expert with a stable sort, copy
each token once per choice, one product per expert forward and two backward, ReLU, torch's dropout, the second
products, rows back into the order of tokens, and a batched product with the weights. No capacity, no token
is dropped. Stand-ins for its kernels: bincount, argsort and a loop of matrix products.

Shapes: T tokens, D model width, E experts, K choices per token, N = T * K rows, F hidden width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _ExpertLinear(torch.autograd.Function):
    """Rows sorted by expert, counts[e] of them through linear map e."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, counts: list[int], weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(len(rows), weight.shape[1])
        for e, (x, y) in enumerate(zip(rows.split(counts), out.split(counts), strict=True)):
            torch.addmm(bias[e], x, weight[e].t(), out=y)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)
        d_bias = weight.new_empty(weight.shape[:2])
        parts = zip(rows.split(ctx.counts), gradient.split(ctx.counts), d_rows.split(ctx.counts), strict=True)
        for e, (x, dy, dx) in enumerate(parts):
            torch.mm(dy, weight[e], out=dx)
            torch.mm(dy.t(), x, out=d_weight[e])
            torch.sum(dy, dim=0, out=d_bias[e])
        return d_rows, None, d_weight, d_bias


class LinearGate(nn.Module):
    """Logits x W^T + b."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(n_experts))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, E]."""
        return functional.linear(x_TD, self.weight, self.bias)


class HyperGate(nn.Module):
    """Logits of a linear map that a frozen two-layer network makes of a trained vector, in every pass."""

    hypernet_w_in: torch.Tensor
    hypernet_b_in: torch.Tensor
    hypernet_w_out: torch.Tensor
    hypernet_b_out: torch.Tensor

    def __init__(self, d_model: int, n_experts: int, hyper_size: int) -> None:
        super().__init__()
        n_generated = n_experts * (d_model + 1)
        self.n_experts = n_experts
        self.embedding = nn.Parameter(torch.empty(d_model))
        self.register_buffer("hypernet_w_in", torch.empty(hyper_size, d_model))
        self.register_buffer("hypernet_b_in", torch.empty(hyper_size))
        self.register_buffer("hypernet_w_out", torch.empty(n_generated, hyper_size))
        self.register_buffer("hypernet_b_out", torch.empty(n_generated))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, E]."""
        hidden = functional.linear(self.embedding, self.hypernet_w_in, self.hypernet_b_in).relu()
        rows = functional.linear(hidden, self.hypernet_w_out, self.hypernet_b_out).view(self.n_experts, -1)
        return functional.linear(x_TD, rows[:, :-1], rows[:, -1])


class FastMoEExperts(nn.Module):
    """The stacked weights."""

    def __init__(self, d_model: int, n_experts: int, d_expert: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_in = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.b_in = nn.Parameter(torch.empty(n_experts, d_expert))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.b_out = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, rows_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Sorted rows through their experts."""
        hidden = _ExpertLinear.apply(rows_ND, counts, self.w_in, self.b_in).relu()
        hidden = functional.dropout(hidden, self.dropout, self.training)
        out: torch.Tensor = _ExpertLinear.apply(hidden, counts, self.w_out, self.b_out)
        return out


class FastMoELayer(nn.Module):
    """The layer; parameters have the names of `megamoe.moe.layer.MoELayer`'s."""

    def __init__(self, router: nn.Module, experts: FastMoEExperts, top_k: int) -> None:
        super().__init__()
        self.router, self.experts, self.top_k = router, experts, top_k

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The weighted outputs of each token's experts, [T, D]."""
        top_TK, expert_ids_TK = self.router(x_TD).topk(self.top_k, dim=-1)
        weights_TK = top_TK.softmax(-1)
        expert_ids_N = expert_ids_TK.flatten()
        counts = expert_ids_N.bincount(minlength=len(self.experts.w_in)).tolist()
        sorted_N = expert_ids_N.argsort(stable=True)
        rows_ND = self.experts(x_TD.index_select(0, sorted_N // self.top_k), counts)
        in_order_ND = torch.empty_like(rows_ND).index_copy(0, sorted_N, rows_ND)
        return torch.bmm(weights_TK[:, None], in_order_ND.unflatten(0, (-1, self.top_k))).squeeze(1)
