"""Open whatever a path is: a neutral checkpoint, an exported model, DeepSpeed's files, a published model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamoe.checkpoint.exported import ExportReader, is_export
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.config.schema import RunConfig
from megamoe.convert import from_deepspeed, from_reference
from megamoe.convert.model_tensors import model_tensors
from megamoe.convert.native import LATEST, MODEL_FILE
from megamoe.convert.native_reader import read_model
from megamoe.convert.neutral import open_neutral
from megamoe.convert.published import read_published
from megamoe.convert.published_config import run_config
from megamoe.convert.tensors import LazyTensor
from megamoe.convert.zero_shards import read_shards
from megamoe.errors import CheckpointError

PUBLISHED_FILE = "model.pt"


@dataclass(frozen=True)
class Opened:
    """A checkpoint of any kind; only headers have been read.

    Attributes:
        path: where it is, once the newest of a run is found.
        kind: what it is, for people.
        tensors: its tensors under our names.
        config: of its model; None where the files do not tell.
        verify_files: compares bytes with hashes and raises CheckpointError; None where there are no hashes.
    """

    path: Path
    kind: str
    tensors: list[LazyTensor]
    config: RunConfig | None
    verify_files: Callable[[], None] | None = None


def open_any(path: Path) -> Opened:
    """Open the checkpoint at `path`, and tell its kind from its files.

    Raises:
        CheckpointError: it is none of those known here, or damaged.
    """
    if path.is_file():
        return _open_published(path)
    if is_export(path):
        return _open_export(path)
    if (path / LATEST).is_file() or (path / MODEL_FILE).is_file():
        return _open_native(path)
    if (path / PUBLISHED_FILE).is_file():
        return _open_published(path / PUBLISHED_FILE)
    folder = locate(path)
    tensors, config, _ = open_neutral(folder, verify=False)

    def verify_files() -> None:
        CheckpointReader(folder).verify_files()

    return Opened(folder, "neutral checkpoint", tensors, config, verify_files)


def _open_published(path: Path) -> Opened:
    published = read_published(path)
    config = run_config(published)
    tensors = list(from_reference.neutral_tensors(published, config))
    return Opened(path, "published model", tensors, config)


def _open_export(path: Path) -> Opened:
    reader = ExportReader(path)
    kinds = model_tensors(reader.config)
    tensors = []
    for name in sorted(reader.files):
        shape, dtype = reader.describe(name)
        kind, _ = kinds.get(name, ("weight", ()))
        tensors.append(LazyTensor(kind, name, shape, dtype, partial(reader.tensor, name, shape)))
    return Opened(path, "exported model", tensors, reader.config)


def _open_native(path: Path) -> Opened:
    model = read_model(path)
    shards = read_shards(model.folder, from_deepspeed.world_size_of(model), model.n_experts)
    try:
        config = from_deepspeed.read_config(model, None)
    except CheckpointError:
        config = None
    tensors = list(from_deepspeed.neutral_tensors(model, shards))
    return Opened(model.folder, "DeepSpeed checkpoint", tensors, config)
