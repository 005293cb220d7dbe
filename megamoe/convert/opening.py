"""Open whatever a path is: a neutral checkpoint, an exported model, DeepSpeed's files, a published model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamoe.checkpoint.exported import ExportReader, is_export
from megamoe.checkpoint.format import is_compressed
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.config.schema import RunConfig
from megamoe.convert.export_tensors import export_tensor
from megamoe.convert.native import LATEST, MODEL_FILE
from megamoe.convert.native_reader import read_model
from megamoe.convert.native_tensors import neutral_tensors, read_config, read_optimizer
from megamoe.convert.neutral import open_neutral, tensors_of
from megamoe.convert.tensors import LazyTensor
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
    if is_compressed(folder):
        return _open_compressed(folder)
    tensors, config, _ = open_neutral(folder, verify=False)

    def verify_files() -> None:
        CheckpointReader(folder).verify_files()

    return Opened(folder, "neutral checkpoint", tensors, config, verify_files)


def _open_compressed(folder: Path) -> Opened:
    # What the coded tensors are is known to modules, and modules are made of torch.
    from megamoe.checkpoint.compressed import CompressedReader

    reader = CompressedReader(folder)
    # Without its config, which describes the model that the tensors are restored to.
    return Opened(folder, "compressed checkpoint", tensors_of(reader), None, reader.verify_files)


def _open_published(path: Path) -> Opened:
    # Which of its tensors are trained is known to the model they belong to, and models are made of torch.
    from megamoe.convert.from_reference import open_published

    tensors, config = open_published(path)
    return Opened(path, "published model", tensors, config)


def _open_export(path: Path) -> Opened:
    reader = ExportReader(path)
    tensors = [
        export_tensor(reader, "buffer" if name in reader.buffers else "weight", name)
        for name in sorted(reader.files)
    ]
    verify_files = reader.verify_files if reader.sums else None
    return Opened(path, "exported model", tensors, reader.config, verify_files)


def _open_native(path: Path) -> Opened:
    model = read_model(path)
    shards = read_optimizer(model)
    try:
        config = read_config(model, None)
    except CheckpointError:
        config = None
    return Opened(model.folder, "DeepSpeed checkpoint", list(neutral_tensors(model, shards)), config)
