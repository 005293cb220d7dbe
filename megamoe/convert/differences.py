"""How two checkpoints differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamoe.convert.tensors import LazyTensor, same_bits


@dataclass(frozen=True)
class Difference:
    """How a tensor of one checkpoint differs from that of another.

    Attributes:
        kind: kind of the tensor.
        name: its name.
        what: "only in A", "only in B", "shape", "values", or "type" where the values are equal.
        largest: largest difference of two numbers.
        relative: L2 norm of the difference over that of the tensor in A; None where that is 0.
        detail: shapes or types, for people.
    """

    kind: str
    name: str
    what: str
    largest: float = 0.0
    relative: float | None = 0.0
    detail: str = ""


def differences(a: Sequence[LazyTensor], b: Sequence[LazyTensor]) -> Iterator[Difference]:
    """Every tensor that two checkpoints do not hold alike; one of each is in memory at a time."""
    ours, theirs = ({(t.kind, t.name): t for t in tensors} for tensors in (a, b))
    for kind, name in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get((kind, name)), theirs.get((kind, name))
        if first is None or second is None:
            yield Difference(kind, name, "only in B" if first is None else "only in A")
        elif first.shape != second.shape:
            detail = f"{list(first.shape)} and {list(second.shape)}"
            yield Difference(kind, name, "shape", detail=detail)
        elif found := _compare(first, second):
            yield found


def _compare(first: LazyTensor, second: LazyTensor) -> Difference | None:
    ours, theirs = first.checked(), second.checked()
    if first.dtype == second.dtype and same_bits(ours, theirs):
        return None
    detail = f"{first.dtype} and {second.dtype}" if first.dtype != second.dtype else ""
    if not (ours.is_floating_point() or theirs.is_floating_point()):
        # Doubles would round whole numbers.
        apart = int((theirs.long() - ours.long()).abs().max()) if ours.numel() else 0
        return Difference(first.kind, first.name, "values" if apart else "type", apart, None, detail)
    change = theirs.double() - ours.double()
    largest = float(change.abs().max()) if change.numel() else 0.0
    if largest == 0 and detail:
        return Difference(first.kind, first.name, "type", detail=detail)
    norm = float(ours.double().norm())
    relative = float(change.norm()) / norm if norm else None
    return Difference(first.kind, first.name, "values", largest, relative, detail)
