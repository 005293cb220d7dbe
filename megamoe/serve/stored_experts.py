"""Experts of a checkpoint in its files, of which one expert at a time is read."""

import math

import torch

from megamoe.checkpoint.exported import ExportReader
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.moe.experts import Experts
from megamoe.moe.mixture import Weights


class StoredExperts:
    """The experts of one layer.

    Args:
        reader: the checkpoint, whose tensors are known to be those of the model.
        name: of the module that holds them in the model.
        experts: that module, on the meta device.

    Attributes:
        n_bytes: of one expert on the device.
    """

    def __init__(self, reader: CheckpointReader | ExportReader, name: str, experts: Experts) -> None:
        self._reader = reader
        self._like = experts.weights
        self._names = [f"{name}.{field}" for field in Weights._fields]
        self.n_experts = experts.n_experts
        self.n_bytes = sum(math.prod(stack.shape[1:]) * stack.element_size() for stack in self._like)

    def empty(self, n_slots: int, device: torch.device, *, pinned: bool = False) -> Weights:
        """Stacks of `n_slots` experts, to be filled.

        Args:
            pinned: in page-locked host memory.
        """
        return Weights(
            *(
                torch.empty(n_slots, *stack.shape[1:], dtype=stack.dtype, device=device, pin_memory=pinned)
                for stack in self._like
            )
        )

    def read(self, expert: int, into: Weights) -> None:
        """The parameters of an expert into host memory; any thread may ask.

        Raises:
            CheckpointError: the files are not what they were.
        """
        for name, place in zip(self._names, into, strict=True):
            self._reader.read_row(name, expert, place)
