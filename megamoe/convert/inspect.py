"""What is in a checkpoint, whether it is sound, and how two of them differ."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megamoe.checkpoint.exported import BAKED
from megamoe.checkpoint.format import KINDS, dtype_name
from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.opening import Opened
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import MegaMoEError

EXPERTS = ".experts."


@dataclass(frozen=True)
class Row:
    """A tensor, or all tensors below a path, in a listing.

    Attributes:
        depth: components of the path before it.
        label: last component of the path.
        n_bytes: of all tensors in it.
        shape: of a tensor, None of a path.
        dtype: of a tensor, else empty.
        norm: L2 norm over all its numbers; None where it was not asked for.
    """

    depth: int
    label: str
    n_bytes: int
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    norm: float | None = None


def tree(tensors: Sequence[LazyTensor], norm: Callable[[LazyTensor], float] | None = None) -> Iterator[Row]:
    """The tensors by kind and path, each path before what is in it.

    Args:
        tensors: of a checkpoint.
        norm: gives the norm of a tensor, and reads it for that; None shows none.
    """
    paths = [((tensor.kind, *tensor.name.split(".")), tensor) for tensor in tensors]
    paths.sort(key=lambda item: (KINDS.index(item[1].kind), [_natural(part) for part in item[0]]))
    below: dict[tuple[str, ...], int] = defaultdict(int)
    for path, tensor in paths:
        for depth in range(1, len(path)):
            below[path[:depth]] += tensor.n_bytes
    former: tuple[str, ...] = ()
    for path, tensor in paths:
        for depth in range(1, len(path)):
            if former[:depth] != path[:depth]:
                yield Row(depth - 1, path[depth - 1], below[path[:depth]])
        value = norm(tensor) if norm else None
        yield Row(len(path) - 1, path[-1], tensor.n_bytes, tensor.shape, dtype_name(tensor.dtype), value)
        former = path


def _natural(part: str) -> tuple[int, str]:
    """Sorts layer 10 after layer 9."""
    return (int(part), "") if part.isdecimal() else (-1, part)


def norm_of(tensor: LazyTensor) -> float:
    """L2 norm over all numbers of a tensor, which is read for that."""
    return float(tensor.checked().double().norm())


def problems(opened: Opened) -> Iterator[str]:
    """Everything that is wrong with a checkpoint; reads all of it.

    Hashes, the tensors that the config's model has (so every expert once), finite numbers, and twins: two
    experts of a layer with the same weights, which is what a loader that loses experts leaves behind.
    """
    checks = [opened.verify_files] if opened.verify_files else []
    if opened.config:
        checks.append(lambda: _require_model(opened))
    for check in checks:
        try:
            check()
        except MegaMoEError as error:
            yield str(error)
    experts: dict[str, list[hashlib._Hash]] = {}
    for tensor in opened.tensors:
        try:
            values = tensor.checked()
        except MegaMoEError as error:
            yield str(error)
            continue
        if not values.isfinite().all():
            yield f"{tensor.kind} {tensor.name}: holds numbers that are not finite"
        if tensor.kind == "weight" and EXPERTS in tensor.name:
            layer = tensor.name.partition(EXPERTS)[0]
            digests = experts.setdefault(layer, [hashlib.sha256() for _ in range(len(values))])
            for digest, expert in zip(digests, values, strict=False):
                digest.update(expert.contiguous().view(torch.uint8).numpy())
    for layer, digests in experts.items():
        yield from _twins(layer, [digest.digest() for digest in digests])


def _require_model(opened: Opened) -> None:
    assert opened.config is not None
    own = (t for t in opened.tensors if t.kind != "memory" and not _is_generated(t, opened))
    require_tensors_of(opened.config, own)


def _is_generated(tensor: LazyTensor, opened: Opened) -> bool:
    """Whether it is a router that an export holds besides what it is generated from."""
    assert opened.config is not None
    return opened.config.moe.router.name == "hyper" and BAKED.fullmatch(tensor.name) is not None


def _twins(layer: str, digests: Sequence[bytes]) -> Iterator[str]:
    same = defaultdict(list)
    for expert, digest in enumerate(digests):
        same[digest].append(expert)
    for twins in same.values():
        for first, second in pairwise(twins):
            yield f"{layer}: experts {first} and {second} are twins: all their weights are equal"


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
    if first.dtype == second.dtype and torch.equal(ours, theirs):
        return None
    detail = ""
    if first.dtype != second.dtype:
        detail = f"{dtype_name(first.dtype)} and {dtype_name(second.dtype)}"
    change = theirs.double() - ours.double()
    largest = float(change.abs().max()) if change.numel() else 0.0
    if largest == 0 and detail:
        return Difference(first.kind, first.name, "type", detail=detail)
    norm = float(ours.double().norm())
    relative = float(change.norm()) / norm if norm else None
    return Difference(first.kind, first.name, "values", largest, relative, detail)
