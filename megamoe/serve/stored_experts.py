"""Experts of a checkpoint in host memory: files that are mapped, of which one expert at a time is read."""

import math
import threading

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
        lock: held while the files are read; of all layers of a checkpoint the same.

    Attributes:
        n_bytes: of one expert on the device.
    """

    def __init__(
        self, reader: CheckpointReader | ExportReader, name: str, experts: Experts, lock: threading.Lock
    ) -> None:
        self._reader, self._lock = reader, lock
        self._like = experts.weights
        self._names = [f"{name}.{field}" for field in Weights._fields]
        self.n_experts = experts.n_experts
        self.n_bytes = sum(math.prod(stack.shape[1:]) * stack.element_size() for stack in self._like)

    def empty(self, n_slots: int, device: torch.device) -> Weights:
        """Stacks of `n_slots` experts, to be filled."""
        return Weights(
            *(
                torch.empty(n_slots, *stack.shape[1:], dtype=stack.dtype, device=device)
                for stack in self._like
            )
        )

    def read(self, expert: int) -> list[torch.Tensor]:
        """The parameters of an expert in the order of `Weights`; any thread may ask.

        Raises:
            CheckpointError: the files are not what they were.
        """
        with self._lock:
            rows = [self._reader.row(name, expert) for name in self._names]
            # The kernel maps far more than what is read, which else stays; opening anew takes 0.25 ms.
            self._reader.close_files()
        return rows
