"""Cross-entropy of a linear map's logits, without ever holding all of them.

    loss_t = log sum_v exp(l_tv) - l_{t, y_t}        l_t = W h_t + b

Logits are made for so many tokens at a time as fit `LOGITS_AT_ONCE`, in fp32 or wider, and made again in the
backward pass, which needs the logarithms of the sums alone: dl_tv = (exp(l_tv - lse_t) - [v = y_t]) dloss_t.

Shapes: T tokens, D width, V symbols; n tokens at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from megamoe.moe.precision import at_least_fp32, out_of_autocast

LOGITS_AT_ONCE = 1 << 23


def linear_cross_entropy(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor, targets_T: torch.Tensor
) -> torch.Tensor:
    """Losses [T] in nats, fp32 or wider. Where all logits fit at once they are kept, which is faster."""
    if len(hidden_TD) * len(weight_VD) <= LOGITS_AT_ONCE:
        return cross_entropy(at_least_fp32(linear(hidden_TD, weight_VD, bias_V)), targets_T, reduction="none")
    with out_of_autocast(hidden_TD, weight_VD, bias_V) as inputs:
        loss_T: torch.Tensor = _LinearCrossEntropy.apply(*inputs, targets_T)
        return loss_T


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor,
        targets_T: torch.Tensor,
    ) -> torch.Tensor:
        sums, chosen = [], []
        for part in _parts(hidden_TD, weight_VD):
            logits_nV = at_least_fp32(linear(hidden_TD[part], weight_VD, bias_V))
            sums.append(logits_nV.logsumexp(1))
            chosen.append(logits_nV.gather(1, targets_T[part, None])[:, 0])
        log_sum_T = torch.cat(sums)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, log_sum_T)
        return log_sum_T - torch.cat(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, targets_T, log_sum_T = ctx.saved_tensors
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD, dbias_V = (torch.zeros_like(x, dtype=log_sum_T.dtype) for x in (weight_VD, bias_V))
        for part in _parts(hidden_TD, weight_VD):
            logits_nV = at_least_fp32(linear(hidden_TD[part], weight_VD, bias_V))
            dlogits_nV = logits_nV.sub_(log_sum_T[part, None]).exp_()
            dlogits_nV.scatter_add_(1, targets_T[part, None], -torch.ones_like(log_sum_T[part, None])).mul_(
                dloss_T[part, None]
            )
            dbias_V += dlogits_nV.sum(0)
            dlogits_nV = dlogits_nV.to(hidden_TD.dtype)
            torch.mm(dlogits_nV, weight_VD, out=dhidden_TD[part])
            dweight_VD += dlogits_nV.t() @ hidden_TD[part]
        return dhidden_TD, dweight_VD.to(weight_VD.dtype), dbias_V.to(bias_V.dtype), None


def _parts(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    """Tokens whose logits are held at a time."""
    at_once = max(1, LOGITS_AT_ONCE // len(weight_VD))
    for first in range(0, len(hidden_TD), at_once):
        yield slice(first, min(first + at_once, len(hidden_TD)))
