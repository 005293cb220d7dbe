"""The dense feed-forward network of layers without experts."""

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.moe.dropout import Dropout


class FeedForward(nn.Module):
    """Linear(D -> F), ReLU, Dropout, Linear(F -> D), both with bias: one expert that sees every token.

    Args:
        d_model: model width D.
        d_inner: hidden width F.
        dropout: dropout on the hidden units.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_in = nn.Parameter(torch.empty(d_inner, d_model))
        self.b_in = nn.Parameter(torch.empty(d_inner))
        self.w_out = nn.Parameter(torch.empty(d_model, d_inner))
        self.b_out = nn.Parameter(torch.empty(d_model))

    def forward(self, x_BSD: torch.Tensor, keys_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Apply to every position, [B, S, D]; `keys_BS` are the tokens', for dropout."""
        hidden_BSF = self.dropout(linear(x_BSD, self.w_in, self.b_in).relu(), keys_BS)
        return linear(hidden_BSF, self.w_out, self.b_out)
