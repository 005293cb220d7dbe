"""A dense feed-forward network of equal FLOPs, in plain torch: D -> K * F -> D, with torch's dropout."""

from torch import nn


def dense(d_model: int, d_hidden: int, dropout: float) -> nn.Module:
    """Linear, ReLU, dropout, linear."""
    return nn.Sequential(
        nn.Linear(d_model, d_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(d_hidden, d_model)
    )
