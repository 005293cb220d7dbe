"""What the mixture layers may ask of the data-parallel ranks, without knowing how they are reached."""

from typing import Protocol

import torch


class Ranks(Protocol):
    """The data-parallel ranks of a run. Every rank makes the same calls in the same order."""

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor that has the same shape on all, without gradient."""
        ...

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of all ranks, in rank order, without gradient, and where this rank's begin."""
        ...


class OneRank:
    """The only rank: `Ranks` without communication."""

    world_size = 1

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values.detach()

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows themselves."""
        return rows.detach(), 0


ONE_RANK = OneRank()
