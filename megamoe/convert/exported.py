"""Write exported models, see `megamoe.checkpoint.exported`."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamoe import __version__
from megamoe.checkpoint.dtypes import DTYPES, torch_dtype
from megamoe.checkpoint.exported import CARD, INDEX, MODEL, MODEL_TYPE, SUMS, TOKENIZER
from megamoe.checkpoint.format import CONFIG
from megamoe.checkpoint.shard import safetensors_file, write_file
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RunConfig
from megamoe.convert.model_card import model_card
from megamoe.convert.neutral_writer import new_folder
from megamoe.convert.progress import Progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Names of types by what they are called on the command line."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """``500MB`` as bytes."""
    match = re.fullmatch(r"(\d+)([KMG]?B)", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2]]


def as_type(tensors: Iterable[LazyTensor], dtype: str) -> list[LazyTensor]:
    """The tensors with floating weights in `dtype`. What belongs to a router keeps its type."""
    return [
        tensor
        if not DTYPES[tensor.dtype].is_floating or tensor.dtype == dtype or ".moe.router." in tensor.name
        else replace(tensor, dtype=dtype, load=partial(_cast, tensor, dtype))
        for tensor in tensors
    ]


def _cast(tensor: LazyTensor, dtype: str) -> torch.Tensor:
    return narrowed(tensor.name, tensor.checked(), dtype)


def narrowed(name: str, values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The numbers of tensor `name` in `dtype`.

    Raises:
        CheckpointError: some are beyond its range.
    """
    result = values.to(torch_dtype(dtype))
    if result.dtype != values.dtype and _is_finite(values) and not _is_finite(result):
        raise CheckpointError(f"{name}: holds numbers beyond the range of {dtype}; give bf16")
    return result


def _is_finite(values: torch.Tensor) -> bool:
    """As ``values.isfinite().all()``, which would take as much memory as `values` do."""
    return not values.numel() or all(bound.isfinite() for bound in torch.aminmax(values))


def write_export(
    folder: Path,
    tensors: Sequence[LazyTensor],
    config: RunConfig,
    state: TrainingState,
    *,
    shard_size: int,
    progress: Progress | None = None,
) -> None:
    """Write an exported model; one tensor at a time is in memory.

    Args:
        folder: where; it must not exist yet.
        tensors: weights and buffers, in the types to store.
        config: of the run, the vocabulary size resolved.
        state: of the run; its tokenizer becomes a file of its own.
        shard_size: bytes of tensors above which another file is begun.
        progress: told the bytes of every tensor that was loaded.

    Raises:
        CheckpointError: the folder exists, or the disk refuses. Nothing is left then.
    """
    shards = _shards(tensors, shard_size)
    documents = {
        CONFIG: _json(_description(tensors, config, state)),
        TOKENIZER: _json(state.tokenizer),
        CARD: model_card(tensors, config, state),
    }
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, members in shards.items() for tensor in members}
        documents[INDEX] = _json({"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map})
    written = {}
    with new_folder(folder) as unfinished:
        for name, members in shards.items():
            ordered = sorted(members, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
            named = [(t.name, t.shape, t.dtype, _loader(t, progress)) for t in ordered]
            written[name] = write_file(unfinished / name, safetensors_file(named))
        for name, text in documents.items():
            written[name] = write_file(unfinished / name, [text.encode()])
        del written[CARD]  # people edit it
        sums = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(written.items()))
        write_file(unfinished / SUMS, [sums.encode()])


def _shards(tensors: Sequence[LazyTensor], shard_size: int) -> dict[str, list[LazyTensor]]:
    """Files by name; each but the last is as full as `shard_size` allows, or holds one larger tensor."""
    groups: list[list[LazyTensor]] = [[]]
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if groups[-1] and total_bytes(groups[-1]) + tensor.n_bytes > shard_size:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {MODEL: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _loader(tensor: LazyTensor, progress: Progress | None) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        values = tensor.checked().contiguous()
        if progress:
            progress(tensor.n_bytes)
        return values

    return load


def _description(tensors: Sequence[LazyTensor], config: RunConfig, state: TrainingState) -> dict[str, Any]:
    embedding = next(tensor for tensor in tensors if tensor.name == "embedding.weights.0")
    values = asdict(state)
    del values["tokenizer"]
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["Classifier" if config.task.name else "TransformerXL"],
        "torch_dtype": embedding.dtype,
        "buffers": sorted(tensor.name for tensor in tensors if tensor.kind == "buffer"),
        "megamoe_version": __version__,
        "config": config.to_dict(),
        "state": values,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
