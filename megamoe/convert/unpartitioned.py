"""Read the optimizer states that DeepSpeed writes at ZeRO stage 0, where nothing is partitioned.

A file per expert-parallel rank holds the states of what all ranks share and of the rank's own experts; a
model without experts has them in its model file. States carry numbers instead of names: they count the
parameters in the order of the model, then the rank's experts layer by layer and expert by expert.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from megamoe.checkpoint.format import MOMENTS
from megamoe.convert.native import MODEL_FILE, expert_name
from megamoe.convert.native_reader import MODULES, NativeModel, structure_of
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.convert.zero_shards import MOST_OPEN, Shards, Span
from megamoe.errors import CheckpointError

_FILE = re.compile(r"expp_rank_(\d{1,9})_mp_rank_00_optim_states\.pt")
_DEFAULT_GROUPS = re.compile(r"dense-params|ep_size_\d{1,9}")

Shapes = dict[str, tuple[int, ...]]


def read_unpartitioned(model: NativeModel, ep_size: int | None = None) -> Shards | None:
    """Open the optimizer states of all expert-parallel ranks; None if there are none.

    Args:
        model: the weights beside them.
        ep_size: what it must be; None takes what the files say.

    Raises:
        CheckpointError: files are missing or damaged, of another ep_size, or of groups of parameters whose
            order is not known.
    """
    files = _rank_files(model)
    if not files:
        return None
    if ep_size not in (None, len(files)):
        raise CheckpointError(
            f"--ep-size = {ep_size}: checkpoint {str(model.folder)!r} was saved at {len(files)}"
        )
    spans: dict[tuple[str, str], list[Span]] = {}
    steps: set[int] = set()
    opened = lru_cache(maxsize=MOST_OPEN)(partial(TorchFile, modules=MODULES))
    for rank, path in enumerate(files):
        shapes = _shapes(model, rank, len(files))
        try:
            states = list(_states(structure_of(path)["optimizer"], shapes, steps))
            if len({(stored.storage, stored.offset) for _, _, stored in states}) < len(states):
                raise ValueError("two of its tensors are one")
            for kind, name, stored in states:
                span = _span(partial(opened, path), name, stored, shapes[name])
                spans.setdefault((kind, name), [span])  # what all ranks share is in every file
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"file {str(path)!r}: not laid out as DeepSpeed's ({type(error).__name__}: {error})"
            ) from None
    if len(steps) != 1:
        raise CheckpointError(
            f"checkpoint {str(model.folder)!r}: parameters have different Adam steps {sorted(steps)[:4]};"
            " --weights-only leaves its states out"
        )
    return Shards(spans, steps.pop(), len(files))


def _rank_files(model: NativeModel) -> list[Path]:
    if not model.experts:
        optimizer = model.main.get("optimizer")
        return [model.folder / MODEL_FILE] if isinstance(optimizer, dict) and optimizer else []
    found = {int(match[1]): path for path in model.folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    counts = set(model.n_experts.values())
    if missing := set(range(len(found))) - found.keys():
        raise CheckpointError(f"checkpoint {str(model.folder)!r}: missing expp_rank_{min(missing)}_...")
    if found and any(count % len(found) for count in counts):
        raise CheckpointError(
            f"checkpoint {str(model.folder)!r}: {len(found)} expp_rank files cannot share"
            f" {max(counts)} experts"
        )
    return [found[rank] for rank in range(len(found))]


def _shapes(model: NativeModel, rank: int, ep_size: int) -> Shapes:
    """Shape of every parameter that `rank` trains, by native name with global ids, in their order there."""
    shapes = {name: part.shape for name, part in model.weights.items() if name not in model.buffers}
    for path, n_experts in model.n_experts.items():
        leaves = {leaf: parts for (other, leaf), parts in model.experts.items() if other == path}
        n_local = n_experts // ep_size
        for expert in range(rank * n_local, (rank + 1) * n_local):
            for leaf, parts in leaves.items():
                shapes[expert_name(path, expert, leaf)] = parts[expert].shape
    return shapes


def _states(
    saved: Mapping[str, Any], shapes: Shapes, steps: set[int]
) -> Iterator[tuple[str, str, StoredTensor]]:
    """Kind, name and place of moments and, in 16 bits, of masters; what Adam counts goes into `steps`."""
    adam = saved.get("optimizer_state_dict", saved)
    groups = adam["param_groups"]
    if len(groups) > 1 and not all(_is_default(group.get("name")) for group in groups):
        raise ValueError("groups of your own have an order that only your program knows; use --weights-only")
    numbers = [number for group in groups for number in group["params"]]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError("a parameter's number is none")
    if "fp32_groups_flat" in saved or len(numbers) != len(shapes):
        raise ValueError(f"it holds {len(numbers)} states for {len(shapes)} parameters")
    masters = [master for group in saved.get("fp32_groups", ()) for master in group]
    for name, master in zip(shapes, masters, strict=True) if masters else ():
        yield "weight", name, master
    for name, number in zip(shapes, numbers, strict=True):
        state = adam["state"][number]
        step = state["step"]
        steps.add(int(step.file.number(step) if isinstance(step, StoredTensor) else step))
        for kind in MOMENTS:
            yield kind, name, state[kind]


def _is_default(name: Any) -> bool:
    return isinstance(name, str) and _DEFAULT_GROUPS.fullmatch(name) is not None


def _span(
    open_file: Callable[[], TorchFile], name: str, stored: StoredTensor, shape: tuple[int, ...]
) -> Span:
    if stored.shape != shape or not stored.is_contiguous:
        raise ValueError(f"a state of {name} has shape {list(stored.shape)}, its weight {list(shape)}")
    return Span(open_file, stored.storage, stored.dtype, stored.offset, stored.numel)
