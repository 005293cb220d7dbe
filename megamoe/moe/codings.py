"""Ways to hold one matrix for each expert in fewer numbers.

Shapes: E experts, F x C one matrix, N kept entries of it, R rank, G groups, B bytes of a bitmap.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from megamoe.errors import CheckpointError


class Coding(nn.Module, ABC):
    """E coded matrices of one shape. The tensors are buffers; a checkpoint stores them under their names.

    Args:
        shape: (F, C) of one matrix.
        tensors: those of `TENSORS`, by name.

    Class attributes:
        NAME: what checkpoints call the coding.
        TENSORS: types of its tensors.
    """

    NAME: ClassVar[str]
    TENSORS: ClassVar[dict[str, torch.dtype]]

    def __init__(self, shape: tuple[int, int], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.shape = shape
        for name in self.TENSORS:
            # What the model's own checkpoints hold is the matrices.
            self.register_buffer(name, tensors[name], persistent=False)

    @abstractmethod
    def matrix(self, expert: int) -> torch.Tensor:
        """The matrix [F, C] of an expert, fp32."""

    @abstractmethod
    def expected_shapes(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """Shapes that the tensors must have, given the sizes that are theirs to choose."""

    def require_sound(self, n_experts: int) -> None:
        """Refuse tensors that no `n_experts` matrices are coded as.

        Raises:
            CheckpointError: naming the tensor.
        """
        for name, expected in self.expected_shapes(n_experts).items():
            found = getattr(self, name)
            if tuple(found.shape) != expected or found.dtype != self.TENSORS[name]:
                raise CheckpointError(
                    f"{name}: {list(found.shape)} of {found.dtype}, expected {list(expected)} of"
                    f" {self.TENSORS[name]}"
                )

    def same_as(self, expert_P: torch.Tensor) -> torch.Tensor:
        """For each choice one expert that stands for all that have its matrix; by default itself."""
        return expert_P


class Pruned(Coding):
    """The entries of largest magnitude, in row-major order, and a bitmap of where they are.

    Bit i of byte b is entry 8 b + i. A bitmap costs one bit an entry, 1/32 of the matrix in fp32, where
    indices of 32 bits would double the size of what is kept.
    """

    NAME = "pruned"
    TENSORS: ClassVar = {"bitmap": torch.uint8, "values": torch.float32}
    bitmap: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, matrices: Iterable[torch.Tensor], keep: float) -> "Pruned":
        """Keep the fraction `keep` of each matrix [F, C], with one threshold for each; exact at 1."""
        bitmaps, values = [], []
        for matrix_FC in matrices:
            shape, flat = matrix_FC.shape, matrix_FC.flatten()
            # Sorted stably, so that equal magnitudes give the same choice everywhere.
            largest = flat.abs().argsort(descending=True, stable=True)[: round(keep * flat.numel())]
            kept = torch.zeros(flat.numel(), dtype=torch.bool).index_fill_(0, largest, True)
            bitmaps.append(pack(kept))
            values.append(flat[kept].float())
        return cls((shape[0], shape[1]), bitmap=torch.stack(bitmaps), values=torch.stack(values))

    def matrix(self, expert: int) -> torch.Tensor:
        """Zeros but for what was kept."""
        kept = unpack(self.bitmap[expert], math.prod(self.shape))
        flat = self.values.new_zeros(kept.shape)
        flat[kept] = self.values[expert]
        return flat.view(self.shape)

    def expected_shapes(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """Any number of values."""
        return {
            "bitmap": (n_experts, -(-math.prod(self.shape) // 8)),
            "values": (n_experts, *self.values.shape[1:2]),
        }

    def require_sound(self, n_experts: int) -> None:
        """Also: every bitmap has as many ones as there are values."""
        super().require_sound(n_experts)
        for bitmap_B in self.bitmap:
            if int(unpack(bitmap_B, 8 * len(bitmap_B)).sum()) != self.values.shape[1]:
                raise CheckpointError(f"bitmap: has not {self.values.shape[1]} ones, the number of values")


class LowRank(Coding):
    """left @ right: a truncated singular value decomposition, singular values in `left`."""

    NAME = "low_rank"
    TENSORS: ClassVar = {"left": torch.float32, "right": torch.float32}
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, matrices: Iterable[torch.Tensor], keep: float) -> "LowRank":
        """The nearest matrices of rank `rank_of(keep, F, C)` (Eckart and Young); exact at 1."""
        lefts, rights = [], []
        for matrix_FC in matrices:
            shape = matrix_FC.shape
            rank = rank_of(keep, shape[0], shape[1])
            u_FR, sigma_R, v_RC = torch.linalg.svd(matrix_FC, full_matrices=False)
            lefts.append((u_FR[:, :rank] * sigma_R[:rank]).float())
            rights.append(v_RC[:rank].float())
        return cls((shape[0], shape[1]), left=torch.stack(lefts), right=torch.stack(rights))

    def matrix(self, expert: int) -> torch.Tensor:
        """The product."""
        return self.left[expert] @ self.right[expert]

    def expected_shapes(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """Any rank."""
        rank = self.left.shape[2:3]
        return {"left": (n_experts, self.shape[0], *rank), "right": (n_experts, *rank, self.shape[1])}


class Shared(Coding):
    """One matrix for each group of experts."""

    NAME = "shared"
    TENSORS: ClassVar = {"matrices": torch.float32, "groups": torch.int64}
    matrices: torch.Tensor
    groups: torch.Tensor

    def matrix(self, expert: int) -> torch.Tensor:
        """That of its group."""
        return self.matrices[self.groups[expert]]

    def expected_shapes(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """Any number of groups."""
        return {"matrices": (*self.matrices.shape[:1], *self.shape), "groups": (n_experts,)}

    def require_sound(self, n_experts: int) -> None:
        """Also: every group exists."""
        super().require_sound(n_experts)
        if not ((self.groups >= 0) & (self.groups < len(self.matrices))).all():
            raise CheckpointError(f"groups: name others than the {len(self.matrices)} that there are")

    def same_as(self, expert_P: torch.Tensor) -> torch.Tensor:
        """The first expert of its group."""
        first_E = (self.groups[:, None] == self.groups).int().argmax(dim=1)
        return first_E[expert_P]


CODINGS: dict[str, type[Coding]] = {coding.NAME: coding for coding in (Pruned, LowRank, Shared)}


def rank_of(keep: float, n_rows: int, n_columns: int) -> int:
    """The rank at which two factors hold the fraction `keep` of the numbers of a matrix; full rank at 1.

    R = floor(keep F C / (F + C)), at least 1. At keep = 1 nothing is dropped, and the factors hold more
    numbers than the matrix.
    """
    if keep == 1:
        return min(n_rows, n_columns)
    return max(1, int(keep * n_rows * n_columns / (n_rows + n_columns)))


def pack(bits_N: torch.Tensor) -> torch.Tensor:
    """Booleans as bytes [ceil(N / 8)], the first in the lowest bit, zeros at the end."""
    padded = nn.functional.pad(bits_N.to(torch.uint8), (0, -len(bits_N) % 8))
    return (padded.view(-1, 8) << _places(bits_N)).sum(1, dtype=torch.uint8)


def unpack(bytes_B: torch.Tensor, n_bits: int) -> torch.Tensor:
    """The first `n_bits` booleans of packed ones."""
    return ((bytes_B[:, None] >> _places(bytes_B)) & 1).flatten()[:n_bits].bool()


def _places(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
