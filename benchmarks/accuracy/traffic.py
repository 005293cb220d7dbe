"""Bytes that a rank sends, counted where torch hands its collectives to the network.

What a collective of n ranks makes each of them send, of tensors of s bytes, is told by the algorithms that
need least: rings, and messages from rank to rank.

    all_reduce                              2 (n - 1) / n s
    all_gather, of s in the end                 (n - 1) / n s
    reduce_scatter, of s at the start           (n - 1) / n s
    reduce, broadcast, in the mean over ranks   (n - 1) / n s
    all_to_all                              what is not for the rank itself
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = "all_reduce", "all_gather", "all_to_all"
REDUCE_SCATTER, REDUCE, BROADCAST = "reduce_scatter", "reduce", "broadcast"

# By the name of torch's operation: the collective, and the places of what has s bytes and of the group.
_OPERATIONS = {
    "allreduce_": (ALL_REDUCE, 0, 1),
    "broadcast_": (BROADCAST, 0, 1),
    "reduce_": (REDUCE, 0, 1),
    "_allgather_base_": (ALL_GATHER, 0, 2),
    "allgather_": (ALL_GATHER, 0, 2),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1, 2),
    "reduce_scatter_": (REDUCE_SCATTER, 1, 2),
    "alltoall_base_": (ALL_TO_ALL, 1, 2),
}
_SILENT = ("barrier", "monitored_barrier_")
"""They carry nothing."""


class TrafficCounter(TorchDispatchMode):
    """Counts what is sent while it is entered, whoever asks for it: megamoe, DeepSpeed or torch.

    Args:
        phase: tells what the training loop does now.
        look: is told the phase and shown the tensors of each reduction before it starts.

    Attributes:
        sent: bytes of this rank by phase and collective.
    """

    def __init__(
        self,
        phase: Callable[[], str],
        look: Callable[[str, Sequence[torch.Tensor]], None] = lambda phase, tensors: None,
    ) -> None:
        super().__init__()
        self.phase, self.look = phase, look
        self.sent: defaultdict[tuple[str, str], float] = defaultdict(float)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._opname, args)
        return function(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        if operation in _SILENT:
            return
        name, place, place_of_group = _OPERATIONS[operation]
        group = dist.ProcessGroup.unbox(args[place_of_group])
        tensors = list(_tensors(args[place]))
        if name == ALL_REDUCE:
            self.look(self.phase(), tensors)
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        if name == ALL_TO_ALL:
            sent = float(n_bytes - _kept(tensors[0], args[4], group))
        else:
            sent = n_bytes * (2 if name == ALL_REDUCE else 1) * (group.size() - 1) / group.size()
        self.sent[self.phase(), name] += sent


def _kept(sent: torch.Tensor, splits: Sequence[int], group: dist.ProcessGroup) -> int:
    """Bytes of an exchange that a rank sends to itself; without `splits` all ranks get equally many rows."""
    if not splits:
        return sent.nbytes // group.size()
    return splits[group.rank()] * sent[:1].nbytes if len(sent) else 0


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
