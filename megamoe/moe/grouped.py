"""Weighted sums of experts' outputs by grouped matrix products, one kernel for all experts, for GPUs.

The same as `megamoe.moe.mixture`, and nothing here waits for the device: how many rows an expert has stays
there. Rows of choices that name no expert stand last, where the products leave their results open.

Shapes: N tokens, P choices, D model width, F hidden width, E experts here.
"""

import torch
from torch.nn import functional

from megamoe.moe.copies import Copies
from megamoe.moe.dropout import Dropout
from megamoe.moe.mixture import Choices, Weights


def mix_grouped(
    x_ND: torch.Tensor,
    choices: Choices,
    weights_P: torch.Tensor,
    weights: Weights,
    dropout: Dropout,
) -> torch.Tensor:
    """See `mixture.mix`.

    The biases are added through a one-hot product, whose gradient is again a product: exact to the
    accumulator and in a fixed order, which adding rows of a gathered bias up again would not be.
    """
    n_experts = len(choices.counts_E)
    ends_E = choices.counts_E.cumsum(0).int()
    taken_P1 = (choices.expert_P < n_experts)[:, None]
    owner_PE = functional.one_hot(choices.expert_P, n_experts + 1)[:, :-1].to(x_ND.dtype)

    def layer(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # Forward and backward, what is left open must not reach anything: times 0 it could still be NaN.
        product = functional.grouped_mm(rows.where(taken_P1, 0), weight.mT, offs=ends_E)
        return product.where(taken_P1, 0) + owner_PE @ bias

    copies = Copies.of(choices.token_P, len(x_ND))
    hidden_PF = layer(copies.gather(x_ND), weights.w_in, weights.b_in).relu()
    if choices.keys_P is not None:
        hidden_PF = dropout(hidden_PF, choices.keys_P)
    return copies.sum(layer(hidden_PF, weights.w_out, weights.b_out), weights_P)
