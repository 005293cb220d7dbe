"""The precision floor of whatever must not be computed in 16 bits: routing, weighted sums, losses."""

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or unchanged where it is wider, so that a model in double stays in double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
