"""Save a run: every rank writes its own shard, rank 0 the manifest, and one rename makes it a checkpoint."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megamoe.checkpoint.collective import on_all_ranks
from megamoe.checkpoint.folder import clear_leftovers, publish, temporary
from megamoe.checkpoint.format import CONFIG, STATE, shard_file
from megamoe.checkpoint.shard import Shard, Slice, write_documents, write_shard
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RunConfig
from megamoe.errors import CheckpointError
from megamoe.parallel.counters import read_counters
from megamoe.parallel.fragments import TrainingEngine, owned_fragments
from megamoe.parallel.launch import World


def save_checkpoint(
    folder: Path,
    engine: TrainingEngine,
    state: TrainingState,
    world: World,
    *,
    run: RunConfig,
    memory: Iterable[Slice] = (),
) -> None:
    """Save a run between two optimizer steps. All ranks must call it.

    Args:
        folder: where; named by `format.step_folder` or `format.BEST`, and replaced if it exists.
        state: of the run; the engine's counters are filled in here.
        run: the run's config with the vocabulary size resolved.
        memory: what `memory_slices` gives for this rank.

    Raises:
        CheckpointError: on all ranks if any of them failed; nothing has changed then.
    """

    def start() -> None:
        if world.is_main:
            clear_leftovers(folder.parent)
            temporary(folder).mkdir(parents=True)

    def write() -> Shard:
        path = temporary(folder) / shard_file(world.rank, world.world_size)
        return write_shard(path, [*_slices(engine), *memory])

    def finish() -> None:
        if world.is_main:
            counted = replace(state, engine=read_counters(engine.deepspeed))
            documents = {CONFIG: json.dumps(run.to_dict(), indent=1), STATE: counted.to_json()}
            write_documents(temporary(folder), documents, shards)
            publish(folder)

    what = f"saving {folder.name}"
    try:
        on_all_ranks(world, what, start)
        shards = on_all_ranks(world, what, write)
        on_all_ranks(world, what, finish)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(temporary(folder), ignore_errors=True)
        raise


def memory_slices(memory: Sequence[torch.Tensor], rows: range, batch_size: int) -> Iterator[Slice]:
    """This rank's part of the Transformer-XL memory, for `save_checkpoint`.

    Args:
        memory: for each layer [B, M, D], B = len(rows); nothing is stored while M is 0.
        rows: the global token streams they belong to.
        batch_size: number of global streams.
    """
    for layer, memory_BMD in enumerate(memory):
        if memory_BMD.numel():
            _, M, D = memory_BMD.shape
            values = memory_BMD.detach().reshape(-1)
            yield Slice("memory", f"layers.{layer}", (batch_size, M, D), rows.start * M * D, values)


def _slices(engine: TrainingEngine) -> Iterator[Slice]:
    for fragment in owned_fragments(engine):
        for kind, values in fragment.tensors.items():
            yield Slice(kind, fragment.name, fragment.global_shape, fragment.start, values)
