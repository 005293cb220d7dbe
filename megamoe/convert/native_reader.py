"""Read the weights in DeepSpeed's native files; `zero_shards` reads the optimizer's."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.convert.native import (
    LATEST,
    MODEL_FILE,
    PARTITIONED_FILE,
    expert_file,
    parse_expert,
    parse_expert_file,
)
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MODULES = (
    "deepspeed.utils.tensor_fragment", "deepspeed.runtime.fp16.loss_scaler", "deepspeed.runtime.zero.config",
    "deepspeed.runtime.lr_schedules", "torch",
)  # fmt: skip
_SHOWN = 3
_LONGEST_TAG = 4096


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a model file; nothing is kept open for it."""

    shape: tuple[int, ...]
    dtype: str
    load: "Callable[[], torch.Tensor]"


@dataclass(frozen=True)
class NativeModel:
    """The weights of a native checkpoint.

    Attributes:
        folder: the folder of the tag, which holds the files.
        main: what the model file holds besides weights.
        weights: by native name, what is not of experts.
        buffers: the names among them that are buffers.
        experts: by path of a mixture layer and leaf, one tensor for each of its experts, in order.
    """

    folder: Path
    main: Mapping[str, Any]
    weights: dict[str, StoredWeight]
    buffers: frozenset[str]
    experts: dict[tuple[str, str], list[StoredWeight]]

    @property
    def n_experts(self) -> dict[str, int]:
        """Experts of each mixture layer, by path."""
        return {path: len(parts) for (path, _), parts in self.experts.items()}


def find_tag(path: Path) -> Path:
    """The folder with the files: `path`, or the one below it that ``latest`` names.

    Raises:
        CheckpointError: there is none.
    """
    latest = path / LATEST
    if latest.is_file() and not (path / MODEL_FILE).exists():
        with latest.open("rb") as file:
            tag = file.read(_LONGEST_TAG).decode(errors="replace").strip()
        if not re.fullmatch(r"\w[\w.-]*", tag):
            raise CheckpointError(f"{str(latest)!r}: {tag[:40]!r} is not the name of a folder beside it")
        path = path / tag
    if (path / PARTITIONED_FILE).is_file():
        raise CheckpointError(
            f"checkpoint {str(path)!r}: was saved at ZeRO stage 3, which cuts weights up and which DeepSpeed"
            " refuses for native MoE layers; save at stage 0 to 2"
        )
    if not (path / MODEL_FILE).is_file():
        raise CheckpointError(
            f"checkpoint {str(path)!r}: has no {MODEL_FILE}; give what DeepSpeed saved at ZeRO stage 0 to 2"
        )
    return path


def read_model(path: Path) -> NativeModel:
    """Open the files of weights; tensors are read on demand.

    Raises:
        CheckpointError: files or experts are missing, come twice, or are not DeepSpeed's.
    """
    folder = find_tag(path)
    main = structure_of(folder / MODEL_FILE)
    try:
        weights = {_text(name): _weight(stored) for name, stored in main["module"].items()}
        buffers = frozenset(map(_text, main.get("buffer_names") or ()))
        counts = [int(n) for n in main.get("num_experts") or ()]
        parallel = int(main.get("mp_world_size", 1)) > 1
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"file {str(folder / MODEL_FILE)!r}: not laid out as DeepSpeed's ({error})"
        ) from None
    if parallel:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: mp_world_size > 1: tensor parallelism is not read"
        )
    return NativeModel(folder, main, weights, buffers, _read_experts(folder, counts))


def structure_of(path: Path) -> dict[str, Any]:
    """The dict in a file of DeepSpeed's.

    Raises:
        CheckpointError: it is damaged, holds something else, or mentions unknown classes.
    """
    structure = TorchFile(path, MODULES).structure()
    if not isinstance(structure, dict):
        raise CheckpointError(f"file {str(path)!r}: holds no dict")
    return structure


def _read_experts(folder: Path, counts: list[int]) -> dict[tuple[str, str], list[StoredWeight]]:
    """Every expert of every layer, exactly once; `counts` are those that the model file promises."""
    found = {file for path in folder.iterdir() if (file := parse_expert_file(path.name))}
    unknown = sorted((layer, e) for layer, e in found if layer >= len(counts) or e >= counts[layer])
    # Counted one by one as far as there are files: what the model file promises may be anything.
    wanted = ((layer, expert) for layer, count in enumerate(counts) for expert in range(count))
    missing = list(islice((file for file in wanted if file not in found), _SHOWN))
    if missing:
        n_missing = sum(max(0, count) for count in counts) - (len(found) - len(unknown))
        raise CheckpointError(f"checkpoint {str(folder)!r}: missing {_listed(missing, n_missing)}")
    if unknown:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {_listed(unknown, len(unknown))} belong to no expert; num_experts"
            f" is {counts}"
        )
    experts: dict[tuple[str, str], list[StoredWeight]] = {}
    for layer, count in enumerate(counts):
        tensors = [_expert_tensors(folder / expert_file(layer, expert), expert) for expert in range(count)]
        first = tensors[0] if tensors else {}
        for expert, others in enumerate(tensors):
            if {key: part.shape for key, part in others.items()} != {
                k: part.shape for k, part in first.items()
            }:
                raise CheckpointError(
                    f"file {str(folder / expert_file(layer, expert))!r}: not the tensors of expert 0"
                )
        for key in first:
            if key in experts:
                raise CheckpointError(f"checkpoint {str(folder)!r}: two layers hold experts of {key[0]!r}")
            experts[key] = [others[key] for others in tensors]
    return experts


def _expert_tensors(path: Path, expert: int) -> dict[tuple[str, str], StoredWeight]:
    tensors = {}
    for name, stored in structure_of(path).items():
        parsed = parse_expert(name) if isinstance(name, str) else None
        if parsed is None or parsed[1] != expert:
            raise CheckpointError(f"file {str(path)!r}: holds {name!r}, which is not of expert {expert}")
        stored = _weight(stored)
        # Opened again when read: there may be more of these files than a process may have open.
        load = partial(_load_expert_tensor, path, name)
        tensors[parsed[0], parsed[2]] = StoredWeight(stored.shape, stored.dtype, load)
    return tensors


def _load_expert_tensor(path: Path, name: str) -> "torch.Tensor":
    return structure_of(path)[name].load()


def _weight(stored: Any) -> StoredWeight:
    if not isinstance(stored, StoredTensor):
        raise CheckpointError("a state dict holds something that is not a tensor")
    return StoredWeight(stored.shape, stored.dtype, stored.load)


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError("a name is no text")
    return name


def _listed(files: list[tuple[int, int]], n_files: int) -> str:
    names: Iterator[str] = (expert_file(*file) for file in files[:_SHOWN])
    more = f" and {n_files - _SHOWN} more" if n_files > _SHOWN else ""
    return ", ".join(names) + more
