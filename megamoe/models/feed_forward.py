"""The dense feed-forward network of layers without experts."""

import torch
from torch import nn
from torch.nn.functional import dropout, linear


class FeedForward(nn.Module):
    """Linear(D -> F), ReLU, Dropout, Linear(F -> D), both with bias: one expert that sees every token.

    Args:
        d_model: model width D.
        d_inner: hidden width F.
        dropout: dropout on the hidden units.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_in = nn.Parameter(torch.empty(d_inner, d_model))
        self.b_in = nn.Parameter(torch.empty(d_inner))
        self.w_out = nn.Parameter(torch.empty(d_model, d_inner))
        self.b_out = nn.Parameter(torch.empty(d_model))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Apply to every position, [B, S, D]."""
        hidden_BSF = dropout(linear(x_BSD, self.w_in, self.b_in).relu(), self.dropout, self.training)
        return linear(hidden_BSF, self.w_out, self.b_out)
