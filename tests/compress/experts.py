"""Stacked experts as design matrices."""

import torch

E, F, D = 5, 8, 6
C = 2 * D + 1


def random_designs(seed: int, shape: tuple[int, ...] = (E, F, C)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def permuted_copies(design_FC: torch.Tensor, n_copies: int, seed: int = 0) -> torch.Tensor:
    """The first is the matrix itself."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(design_FC), generator=generator) for _ in range(n_copies - 1)]
    return torch.stack([design_FC, *(design_FC[order] for order in orders)])
