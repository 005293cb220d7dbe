"""What an action does, counted and not timed: calls, bytes that tensor operations move, bytes that it holds.

The same action counts the same on any machine, so tests may ask how the counts grow.
"""

import sys
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Counts:
    """What one run of an action came to.

    Attributes:
        calls: of functions, Python's own and those of C.
        moved: bytes that tensor operations read and wrote; views move none.
        peak: bytes held at once on top of what was there before: tensors, and objects of Python.
    """

    calls: int
    moved: int
    peak: int


def count(action: Callable[[], Any]) -> Counts:
    """Run `action` twice and count."""
    calls = _calls(action)
    # Counting has a cost of its own: one thing at a time.
    with _Tally() as tally:
        tracemalloc.start()
        try:
            action()
            objects = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return Counts(calls, tally.moved, tally.peak + objects)


def _calls(action: Callable[[], Any]) -> int:
    n_calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return n_calls


class _Tally(TorchDispatchMode):
    """Bytes that operations move, and the most that the storages they made hold at once."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep its compiler away from here, torch would import it, which takes seconds and memory."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.peak = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        for tensor in given:
            self._meet(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = _tensors(result)
            self.moved += sum(tensor.nbytes for tensor in (*given, *made))
            for tensor in made:
                self._meet(tensor, is_new=True)
        return result

    def _meet(self, tensor: torch.Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        n_bytes = storage.nbytes() if is_new else 0
        self._known.add(place)
        self._held += n_bytes
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._part, place, n_bytes)

    def _part(self, place: int, n_bytes: int) -> None:
        self._known.discard(place)
        self._held -= n_bytes


def _tensors(values: Any) -> list[torch.Tensor]:
    """Those among `values` that have memory."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
