"""Checkpoints made of a few tensors, without an engine."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.folder import clear_leftovers, publish, temporary
from megamoe.checkpoint.format import CONFIG, STATE, shard_file, step_folder
from megamoe.checkpoint.shard import Slice, write_documents, write_shard
from megamoe.checkpoint.state import TrainingState
from megamoe.config import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.placement import saved_buffers
from tests.checkpoint.runs import VOCAB_SIZE, run_config

Tensors = Mapping[tuple[str, str], torch.Tensor]


def some_tensors(scale: float = 1.0) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 5, generator=generator) * scale
    return {
        ("weight", "layers.0.moe.experts.w_in"): weight,
        ("exp_avg", "layers.0.moe.experts.w_in"): weight / 2,
        ("exp_avg_sq", "layers.0.moe.experts.w_in"): weight.square(),
        ("weight", "output.bias"): torch.arange(7.0),
        ("buffer", "layers.0.moe.router.table"): torch.arange(9),
        ("memory", "layers.0"): torch.randn(2, 3, 5, generator=generator).bfloat16(),
    }


def slices(tensors: Tensors, shard: int, n_shards: int) -> list[Slice]:
    """The part of every tensor that shard number `shard` of `n_shards` holds."""
    parts = []
    for (kind, name), tensor in tensors.items():
        start, stop = (tensor.numel() * i // n_shards for i in (shard, shard + 1))
        if start < stop:
            parts.append(Slice(kind, name, tuple(tensor.shape), start, tensor.reshape(-1)[start:stop]))
    return parts


def write_small(
    folder: Path,
    tensors: Tensors | None = None,
    n_shards: int = 2,
    config: RunConfig | None = None,
    **state: Any,
) -> Path:
    """Save `tensors` in the order in which `CheckpointWriter` does it."""
    tensors = some_tensors() if tensors is None else tensors
    clear_leftovers(folder.parent)
    temporary(folder).mkdir(parents=True)
    shards = [
        write_shard(temporary(folder) / shard_file(i, n_shards), slices(tensors, i, n_shards))
        for i in range(n_shards)
    ]
    texts = {
        CONFIG: json.dumps((config or RunConfig()).to_dict()),
        STATE: TrainingState(**{"step": 1} | state).to_json(),
    }
    write_documents(temporary(folder), texts, shards)
    publish(folder)
    return folder


def model_of(**updates: Any) -> tuple[RunConfig, TransformerXL]:
    """A small model and its config, see `runs.RUN`."""
    config = run_config(**updates)
    config = replace(config, model=replace(config.model, vocab_size=VOCAB_SIZE))
    return config, TransformerXL(config.model, config.moe, seed=config.training.seed)


def write_model(folder: Path, config: RunConfig, model: TransformerXL, **state: Any) -> Path:
    """Save a model that was not trained."""
    tensors = {("weight", name): parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    return write_small(folder, tensors, config=config, **state)


def write_step(parent: Path, step: int) -> Path:
    return write_small(parent / step_folder(step), step=step)
