"""Continue a saved run, on any number of ranks, at any expert-parallel size and ZeRO stage."""

from dataclasses import asdict

import torch

from megamoe.checkpoint.collective import on_all_ranks
from megamoe.checkpoint.matching import require_same_options, require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.state import TrainingState
from megamoe.errors import CheckpointError
from megamoe.parallel.counters import restore_counters
from megamoe.parallel.engine import Engine
from megamoe.parallel.fragments import publish_weights, restore_fragments
from megamoe.parallel.launch import World


def restore_checkpoint(
    reader: CheckpointReader,
    engine: Engine,
    world: World,
    *,
    load_optimizer: bool = True,
    verify: bool = True,
) -> TrainingState:
    """Put a checkpoint into a running engine. All ranks must call it; each reads only what it holds.

    Args:
        reader: the checkpoint, the same on all ranks.
        engine: of the same model; ranks, ZeRO stage and precision are free.
        world: the ranks.
        load_optimizer: False takes the weights alone and starts Adam and the step counters afresh.
        verify: compare the files with their hashes first; the ranks share them out.

    Returns:
        The state of the saved run.

    Raises:
        CheckpointError: on all ranks, if the checkpoint is of another model or some rank cannot read it.
    """

    def check() -> None:
        require_same_options(reader, engine.model.model_config, engine.model.moe_config)
        require_same_tensors(reader, engine.model)
        if verify:
            reader.verify_files(world.rank, world.world_size)

    def load() -> None:
        optimizer_step = reader.state.engine.optimizer_step if load_optimizer else 0
        restore_fragments(engine, reader.read, optimizer_step=optimizer_step)

    what = f"loading {reader.folder.name}"
    on_all_ranks(world, what, check)
    on_all_ranks(world, what, load)
    publish_weights(engine)
    if load_optimizer:
        restore_counters(engine.deepspeed, asdict(reader.state.engine))
    return reader.state


def read_memory(reader: CheckpointReader, rows: range, batch_size: int) -> tuple[torch.Tensor, ...]:
    """The saved Transformer-XL memory of global token streams `rows`: per layer [B, M, D], B = len(rows).

    Empty where none was saved. On the host, in the type it was trained in.

    Args:
        reader: the checkpoint.
        rows: the streams this rank reads.
        batch_size: number of global streams of the run at hand.

    Raises:
        CheckpointError: the saved run had another number of streams.
    """
    memory = []
    for layer in range(len(reader.names("memory"))):
        name = f"layers.{layer}"
        B, M, D = reader.shape("memory", name)
        if reader.config.model.d_model != D:
            raise CheckpointError(
                f"memory {name}: {D} wide in checkpoint {str(reader.folder)!r}, unlike its model"
            )
        if batch_size != B:
            raise CheckpointError(
                f"training.batch_size = {batch_size}: checkpoint {str(reader.folder)!r} holds the memory of"
                f" {B} streams; set training.batch_size={B} to continue it"
            )
        values = reader.read("memory", name, rows.start * M * D, rows.stop * M * D)
        memory.append(values.view(len(rows), M, D))
    return tuple(memory)
