"""Whether a checkpoint is sound."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from megamoe.checkpoint.exported import BAKED
from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.opening import Opened
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import MegaMoEError

EXPERTS = ".experts."


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
        if tensor.kind == "weight" and EXPERTS in tensor.name and values.numel() and values.dim() > 1:
            layer = tensor.name.partition(EXPERTS)[0]
            digests = experts.setdefault(layer, [hashlib.sha256() for _ in range(len(values))])
            for digest, expert in zip(digests, values, strict=False):
                digest.update(expert.contiguous().view(torch.uint8).numpy())
    for layer, digests in experts.items():
        yield from _twins(layer, [digest.digest() for digest in digests])


def _require_model(opened: Opened) -> None:
    assert opened.config is not None
    own = [t for t in opened.tensors if t.kind != "memory" and not _is_generated(t, opened)]
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
