"""The projection of scores onto the probability simplex, most of whose entries are exactly zero."""

import torch


def sparsemax(z: torch.Tensor) -> torch.Tensor:
    """max(z - tau, 0) over the last dimension, with the tau that makes it sum to 1.

    With z_(1) >= z_(2) >= ... and r = max {j : 1 + j z_(j) > z_(1) + ... + z_(j)},
    tau = (z_(1) + ... + z_(r) - 1) / r.

    Args:
        z: scores; those of -inf are as if they were not there, but not all may be.

    Paper: Martins and Astudillo, ICML 2016, arXiv 1602.02068, algorithm 1.
    """
    falling = z.sort(dim=-1, descending=True).values
    sums = falling.cumsum(-1)
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device)
    size = (1 + ranks * falling > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, size - 1) - 1) / size
    return (z - tau).clamp(min=0)
