"""Read neutral checkpoints as streams of tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RunConfig
from megamoe.convert.tensors import LazyTensor

if TYPE_CHECKING:
    import torch


def open_neutral(
    path: str | Path, *, verify: bool = True
) -> tuple[list[LazyTensor], RunConfig, TrainingState]:
    """The tensors of a neutral checkpoint, sorted by kind and name, its config, and its state.

    Args:
        path: a run folder, whose newest checkpoint is taken; or a ``step-*`` or ``best`` folder.
        verify: compare the files with their hashes, and the tensors with the model; False reads headers
            only.

    Raises:
        CheckpointError: there is no complete checkpoint, its documents are not valid, a file is not what its
            hash says, or the tensors are not those of the config's model.
    """
    reader = CheckpointReader(locate(path))
    tensors = tensors_of(reader)
    if verify:
        # Here, because models are made of torch and listing needs none.
        from megamoe.convert.model_tensors import require_tensors_of

        reader.verify_files()
        require_tensors_of(reader.config, [tensor for tensor in tensors if tensor.kind != "memory"])
    return tensors, reader.config, reader.state


def tensors_of(reader: CheckpointReader) -> list[LazyTensor]:
    """All tensors of a checkpoint, sorted by kind and name."""
    return [
        LazyTensor(kind, name, entry.shape, entry.dtype, _loader(reader, kind, name))
        for kind, name, entry in sorted(reader.manifest.entries())
    ]


def _loader(reader: CheckpointReader, kind: str, name: str) -> "Callable[[], torch.Tensor]":
    def load() -> "torch.Tensor":
        values = reader.tensor(kind, name)
        reader.release(values.nbytes)
        return values

    return load
