"""Read the optimizer shards that DeepSpeed writes at ZeRO stage 1 and 2: fp32 masters and Adam's moments.

Each rank holds, for each group of parameters, one flat partition. A group of experts is partitioned over
the ranks that hold the same experts, any other over all ranks. Ranks r with equal r % ep_size hold the
same experts, and their names for them count from 0.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.checkpoint.dtypes import empty
from megamoe.checkpoint.format import MOMENTS
from megamoe.convert.native import expert_name, parse_expert, shard_file
from megamoe.convert.native_reader import MODULES, structure_of
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MOST_OPEN = 64


@dataclass(frozen=True)
class Span:
    """A range of numbers in a storage of the file that `open` opens, or has open."""

    open: Callable[[], TorchFile]
    storage: str
    dtype: str
    start: int
    numel: int

    def read(self) -> "torch.Tensor":
        """The numbers, 1-D."""
        return self.open().read(self.storage, self.dtype, self.start, self.numel)


@dataclass(frozen=True)
class Shards:
    """The optimizer's tensors, gathered.

    Attributes:
        spans: by kind (weight: the fp32 masters, exp_avg, exp_avg_sq) and native name with global expert
            ids, the parts of the tensor in order.
        step: updates done, as Adam counts them.
        ep_size: ranks that shared one set of experts; 1 without experts.
    """

    spans: dict[tuple[str, str], list[Span]]
    step: int
    ep_size: int

    def read(self, kind: str, name: str) -> "torch.Tensor":
        """A whole tensor, 1-D."""
        spans = self.spans[kind, name]
        if len(spans) == 1:
            return spans[0].read()
        values = empty([sum(span.numel for span in spans)], "float32")
        for part, span in zip(values.split([span.numel for span in spans]), spans, strict=True):
            part.copy_(span.read())
        return values


@dataclass(frozen=True)
class _Flat:
    """Where a flat tensor begins. (A `StoredTensor` would keep its file open, one for each rank.)"""

    storage: str
    dtype: str
    offset: int


@dataclass(frozen=True)
class _Group:
    """A rank's partition of a group: where parameters begin in it, and its flat tensors by kind."""

    addresses: dict[str, tuple[int, int]]
    flats: dict[str, _Flat]
    step: int
    declared_ep_size: int | None


def read_shards(
    folder: Path, world_size: int, n_experts: Mapping[str, int], ep_size: int | None = None
) -> Shards | None:
    """Open the shards of all ranks; None if there are none.

    Args:
        folder: of the files.
        world_size: ranks that saved, as the model file tells.
        n_experts: experts of each mixture layer, by path.
        ep_size: what it must be; None takes what the files say.

    Raises:
        CheckpointError: shards are missing or damaged, or are of another ep_size.
    """
    files = _shard_files(folder, world_size)
    if not files:
        return None
    ranks = [_read_rank(path) for path in files]
    found = _ep_size(ranks, n_experts, world_size)
    if ep_size not in (None, found):
        raise CheckpointError(f"--ep-size = {ep_size}: checkpoint {str(folder)!r} was saved at {found}")
    opened = lru_cache(maxsize=MOST_OPEN)(partial(TorchFile, modules=MODULES))
    spans: dict[tuple[str, str], list[Span]] = {}
    for rank, groups in enumerate(ranks):
        for group in groups:
            for local, (start, numel) in group.addresses.items():
                name = _globalise(local, rank % found, found, n_experts)
                for kind, flat in group.flats.items():
                    span = Span(
                        partial(opened, files[rank]), flat.storage, flat.dtype, flat.offset + start, numel
                    )
                    spans.setdefault((kind, name), []).append(span)
    steps = {group.step for groups in ranks for group in groups}
    if len(steps) != 1:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: ranks count different Adam steps {sorted(steps)[:4]}, or none"
        )
    return Shards(spans, steps.pop(), found)


def require_whole(shards: Shards, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Every trained tensor completely, and no other.

    Args:
        shapes: of all trained tensors, by native name with global expert ids.

    Raises:
        CheckpointError: naming the tensor that is missing, unknown or incomplete.
    """
    kinds = sorted({kind for kind, _ in shards.spans})
    for kind in kinds:
        held = {name for other, name in shards.spans if other == kind}
        for name in sorted(held ^ shapes.keys()):
            what = "not in the model files" if name in held else f"no rank holds its {kind}"
            raise CheckpointError(f"checkpoint {str(folder)!r}: {name}: {what}")
        for name, shape in shapes.items():
            numel = sum(span.numel for span in shards.spans[kind, name])
            if numel != math.prod(shape):
                raise CheckpointError(
                    f"checkpoint {str(folder)!r}: {name}: shards hold {numel} of {math.prod(shape)} {kind}"
                )


def _shard_files(folder: Path, world_size: int) -> list[Path]:
    present = {path.name for path in folder.iterdir()}
    for bf16 in (True, False):
        # What the model file says of their number is not believed before they are there.
        names = [shard_file(rank, bf16=bf16) for rank in range(min(world_size, len(present) + 1))]
        if present & set(names):
            if missing := next((name for name in names if name not in present), None):
                raise CheckpointError(f"checkpoint {str(folder)!r}: missing {missing}")
            return [folder / name for name in names]
    if any("zero_pp_rank" in name for name in present):
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: optimizer states are not of ZeRO stage 1 or 2 on {world_size}"
            " ranks; give --weights-only to leave them out"
        )
    return []


def _read_rank(path: Path) -> list[_Group]:
    try:
        saved = structure_of(path)["optimizer_state_dict"]
        base, flats = saved["base_optimizer_state"], saved["single_partition_of_fp32_groups"]
        if not isinstance(base, dict):
            raise CheckpointError(f"file {str(path)!r}: saved with elastic_checkpoint, which is not read")
        mappings, groups = saved["param_slice_mappings"], base["param_groups"]
        held = [
            _read_group(mapping, flat, group, base["state"])
            for mapping, flat, group in zip(mappings, flats, groups, strict=True)
        ]
        places = [(flat.storage, flat.offset) for group in held for flat in group.flats.values()]
        if len(set(places)) < len(places):
            raise ValueError("two of its tensors are one")
        return held
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"file {str(path)!r}: not laid out as DeepSpeed's ({type(error).__name__}: {error})"
        ) from None


def _read_group(mapping: Any, flat: StoredTensor, group: dict[str, Any], states: dict[Any, Any]) -> _Group:
    number = group["params"][0]
    if not isinstance(number, int):
        raise ValueError("a parameter's number is none")
    state = states.get(number, {})
    tensors = {"weight": flat} | {kind: state[kind] for kind in MOMENTS if kind in state}
    step = state.get("step", group.get("step", 0))
    step = int(step.file.number(step) if isinstance(step, StoredTensor) else step)
    name = group.get("name")
    declared = re.fullmatch(r"ep_size_(\d{1,9})", name) if isinstance(name, str) else None
    addresses = {}
    for name, address in mapping.items():
        start, numel = int(address.state["start"]), int(address.state["numel"])
        if start < 0 or numel < 0:
            raise ValueError(f"{name} lies at {start}")
        for kind, tensor in tensors.items():
            if tensor.stride != (1,) or start + numel > tensor.shape[0]:
                raise ValueError(f"{name} does not lie within its {kind}")
        addresses[str(name)] = (start, numel)
    flats = {kind: _Flat(tensor.storage, tensor.dtype, tensor.offset) for kind, tensor in tensors.items()}
    return _Group(addresses, flats, step, int(declared[1]) if declared else None)


def _ep_size(ranks: list[list[_Group]], n_experts: Mapping[str, int], world_size: int) -> int:
    """How many ranks share a set of experts: the experts of a layer over those that a rank's names count."""
    n_local: dict[str, int] = {}
    for group in (group for groups in ranks for group in groups):
        for name in group.addresses:
            if parsed := parse_expert(name):
                path, expert, _ = parsed
                n_local[path] = max(n_local.get(path, 0), expert + 1)
    all_groups = [group for groups in ranks for group in groups]
    declared = {group.declared_ep_size for group in all_groups if group.declared_ep_size is not None}
    sizes = {n_experts.get(path, 0) / local for path, local in n_local.items()} | declared
    if len(sizes) > 1 or any(size < 1 or world_size % size for size in sizes):
        raise CheckpointError(
            f"ep_size: {world_size} shards have {n_local} local experts of {dict(n_experts)}, at group"
            f" sizes {sorted(declared)}; shards are missing or of another checkpoint"
        )
    return int(sizes.pop()) if sizes else 1


def _globalise(name: str, ep_rank: int, ep_size: int, n_experts: Mapping[str, int]) -> str:
    if parsed := parse_expert(name):
        path, local, leaf = parsed
        return expert_name(path, local + ep_rank * (n_experts[path] // ep_size), leaf)
    return name
