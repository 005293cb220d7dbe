"""Write neutral checkpoints as streams of tensors."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.checkpoint.dtypes import torch_dtype
from megamoe.checkpoint.folder import sync_folder
from megamoe.checkpoint.format import COMPRESSED, COMPRESSION, CONFIG, FORMAT, STATE, shard_file
from megamoe.checkpoint.shard import stored_dtype, write_documents, write_shard
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RunConfig
from megamoe.convert.progress import Progress
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError


def write_neutral(
    folder: Path,
    tensors: Iterable[LazyTensor],
    config: RunConfig,
    state: TrainingState,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a neutral checkpoint of one shard; one tensor at a time is in memory.

    Args:
        folder: where; it must not exist yet.
        tensors: every tensor once.
        config: the run's config, the vocabulary size resolved.
        state: of the run.
        progress: told the bytes of every tensor that was loaded.

    Raises:
        CheckpointError: the folder exists, a tensor comes twice, or the disk refuses. Nothing is left then.
    """
    _write(folder, tensors, _documents(config, state), FORMAT, progress)


def write_compressed(
    folder: Path,
    tensors: Iterable[LazyTensor],
    config: RunConfig,
    state: TrainingState,
    compression: str,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a compressed checkpoint, see `megamoe.checkpoint.compressed`.

    Args:
        folder: where; it must not exist yet.
        tensors: every tensor once, those of kind `compressed` too.
        config: the run's config, the vocabulary size resolved.
        state: of the run.
        compression: the text of its document.
        progress: told the bytes of every tensor that was loaded.

    Raises:
        CheckpointError: see `write_neutral`.
    """
    documents = _documents(config, state) | {COMPRESSION: compression}
    _write(folder, tensors, documents, COMPRESSED, progress)


def _documents(config: RunConfig, state: TrainingState) -> dict[str, str]:
    return {CONFIG: json.dumps(config.to_dict(), indent=1), STATE: state.to_json()}


def _write(
    folder: Path,
    tensors: Iterable[LazyTensor],
    documents: dict[str, str],
    format: str,
    progress: Progress | None,
) -> None:
    parts = [_WholeTensor(tensor, progress) for tensor in tensors]
    with new_folder(folder) as unfinished:
        shard = write_shard(unfinished / shard_file(0, 1), parts)
        write_documents(unfinished, documents, [shard], format)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill under another name; it becomes `folder` at the end, or is removed on failure.

    Raises:
        CheckpointError: `folder` exists, at the start or by the end, or the disk refuses.
    """
    require_new(folder)
    place = folder.resolve()
    unfinished = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_folder(unfinished)
        unfinished.rename(place)  # refuses a folder with something in it
        sync_folder(place.parent)
    except OSError as error:
        raise CheckpointError(f"output {str(folder)!r}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Refuse to write where something is, which work that takes long asks first.

    Raises:
        CheckpointError: `folder` exists.
    """
    if folder.exists():
        raise CheckpointError(f"output {str(folder)!r}: exists; remove it or choose another name")


@dataclass(frozen=True)
class _WholeTensor:
    """A `megamoe.checkpoint.shard.Part` that is the whole of a `LazyTensor`."""

    tensor: LazyTensor
    progress: Progress | None

    start = 0

    @property
    def kind(self) -> str:
        return self.tensor.kind

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def stop(self) -> int:
        return self.tensor.numel

    @property
    def dtype(self) -> str:
        return stored_dtype(self.kind, self.tensor.dtype)

    def on_host(self) -> torch.Tensor:
        values = self.tensor.checked().detach().to("cpu", torch_dtype(self.dtype)).contiguous().view(-1)
        if self.progress:
            self.progress(self.tensor.n_bytes)
        return values
