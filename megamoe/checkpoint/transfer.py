"""The weights of a language model as the start of a classifier."""

from dataclasses import replace

import torch

from megamoe.checkpoint.collective import on_all_ranks
from megamoe.checkpoint.matching import require_same_options, require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import OF_THE_VOCABULARY
from megamoe.models.initialization import initial_values
from megamoe.parallel.engine import Engine
from megamoe.parallel.fragments import publish_weights, restore_fragments
from megamoe.parallel.launch import World
from megamoe.parallel.placement import global_shapes

HEAD, EMBEDDING, OUTPUT = "head.", "embedding.", "output."


def transfer_weights(reader: CheckpointReader, engine: Engine, world: World, *, embedding: bool) -> None:
    """Put what a language model and the classifier of `engine` share into the engine; on all ranks.

    The head starts from random weights, and so does the embedding of another vocabulary. The output layer
    has no place in a classifier. Frozen hypernetworks are among what is shared, so routes do not change.

    Args:
        reader: checkpoint of the language model, the same on all ranks; ranks and ZeRO stage are free.
        engine: of the classifier; Adam starts afresh.
        world: the ranks.
        embedding: False leaves the embedding out, for another vocabulary.

    Raises:
        CheckpointError: on all ranks, if the checkpoint is of another model or some rank cannot read it.
    """
    model = engine.model
    apart = (HEAD, OUTPUT) if embedding else (HEAD, OUTPUT, EMBEDDING)
    shapes = global_shapes(model)

    def check() -> None:
        config = model.model_config
        if not embedding:
            config = replace(
                config, **{name: getattr(reader.config.model, name) for name in OF_THE_VOCABULARY}
            )
        require_same_options(reader, config, model.moe_config)
        require_same_tensors(reader, model, apart_from=apart)
        reader.verify_files(world.rank, world.world_size)

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        if name.startswith(apart):
            return initial_values(name, shapes[name], model.model_config, model.seed).view(-1)[start:stop]
        return reader.read(kind, name, start, stop)

    what = f"starting from {reader.folder.name}"
    on_all_ranks(world, what, check)
    on_all_ranks(world, what, lambda: restore_fragments(engine, read, optimizer_step=0))
    publish_weights(engine)
