"""Read a checkpoint: any range of any tensor, wherever its pieces are. Never unpickles, never trusts."""

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from megamoe.checkpoint.dtypes import DTYPES, empty
from megamoe.checkpoint.file_ranges import FileRanges
from megamoe.checkpoint.folder import replaced
from megamoe.checkpoint.format import (
    CONFIG,
    FORMAT,
    LARGEST_DOCUMENT,
    MANIFEST,
    STATE,
    Manifest,
    Piece,
    TensorEntry,
    parse_object,
    step_folders,
)
from megamoe.checkpoint.mapped_files import MappedFiles
from megamoe.checkpoint.state import TrainingState
from megamoe.config import RunConfig, from_dict
from megamoe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
"""Folder of a run folder that holds its ``step-*`` folders."""
_CORRUPT = "sha256 differs from the manifest's; it is corrupt"


class CheckpointReader:
    """An open checkpoint. Opening reads the manifest and the sizes of files, tensors only on demand.

    Class attributes:
        FORMAT: of the checkpoints that it reads.

    Raises:
        CheckpointError: the folder is torn, or its manifest is not valid.
    """

    FORMAT = FORMAT

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = Manifest.from_json(self._text(MANIFEST), self.FORMAT)
        except CheckpointError as error:
            raise self._error(str(error)) from None
        for name, stored in self.manifest.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise self._error(f"{name}: missing, or not a plain file; the checkpoint is torn")
            if path.stat().st_size != stored.size:
                raise self._error(f"{name}: holds {path.stat().st_size} bytes, not {stored.size}; it is torn")
        self._shards, self._ranges = MappedFiles(folder), FileRanges(folder)

    @cached_property
    def state(self) -> TrainingState:
        """State of the run that was saved."""
        try:
            return TrainingState.from_json(self._document(STATE))
        except CheckpointError as error:
            raise self._error(str(error)) from None

    def schedule(self, cls: type[T]) -> T:
        """State of the saved run's learning-rate schedule, which must be a `cls`, a dataclass.

        Raises:
            CheckpointError: the field and its value, if it is that of another schedule.
        """
        try:
            return self.state.restore_schedule(cls)
        except CheckpointError as error:
            raise self._error(str(error)) from None

    @cached_property
    def config(self) -> RunConfig:
        """Config of the run that was saved, its vocabulary size resolved."""
        try:
            return from_dict(parse_object(self._document(CONFIG), CONFIG))
        except CheckpointError as error:
            raise self._error(str(error)) from None
        except (ConfigError, TypeError, ValueError) as error:
            raise self._error(f"{CONFIG}: {error}") from None

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of `kind`, sorted."""
        return sorted(self.manifest.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a global tensor."""
        return self._entry(kind, name).shape

    def tensor(self, kind: str, name: str) -> "torch.Tensor":
        """A whole global tensor."""
        entry = self._entry(kind, name)
        return self.read(kind, name, 0, entry.numel).view(entry.shape)

    def read(self, kind: str, name: str, start: int, stop: int) -> "torch.Tensor":
        """Elements start..stop of the row-major global tensor, 1-D; no others are read.

        Raises:
            CheckpointError: there is no such tensor or range, or a shard contradicts the manifest.
        """
        entry = self._entry(kind, name)
        if not 0 <= start <= stop <= entry.numel:
            raise self._error(f"{kind} {name}: range {start}:{stop} is not within its {entry.numel} elements")
        values = empty([stop - start], entry.dtype)
        for piece in entry.pieces_of(start, stop):
            first, last = max(start, piece.start), min(stop, piece.stop)
            stored = self._stored(entry, piece)
            values[first - start : last - start] = stored[first - piece.start : last - piece.start]
        return values

    def read_row(self, name: str, index: int, into: "torch.Tensor") -> None:
        """Row `index` of a weight into a contiguous tensor of its shape, no other; any thread may ask.

        Raises:
            CheckpointError: there is no such row, or a shard contradicts the manifest.
        """
        flat = into.view(-1)
        start = index * len(flat)
        for piece in self._entry("weight", name).pieces_of(start, start + len(flat)):
            first, last = max(start, piece.start), min(start + len(flat), piece.stop)
            part = flat[first - start : last - start]
            try:
                self._ranges.read(piece.file, piece.key, first - piece.start, part)
            except CheckpointError as error:
                raise self._error(str(error)) from None

    def release(self, n_bytes: int) -> None:
        """Tell that `n_bytes` were read and are done with: shards do not occupy memory for long then."""
        self._shards.release(n_bytes)

    def verify_files(self, part: int = 0, n_parts: int = 1) -> None:
        """Compare the bytes of every file with the hashes in the manifest.

        Args:
            part: which share of the files, where several processes share them out.
            n_parts: number of shares.

        Raises:
            CheckpointError: naming the first file that differs.
        """
        for name in sorted(self.manifest.files)[part::n_parts]:
            try:
                with (self.folder / name).open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._error(f"{name}: cannot be read ({error})") from None
            if sha256 != self.manifest.files[name].sha256:
                raise self._error(f"{name}: {_CORRUPT}")

    def verify(self) -> None:
        """Read everything: every hash must match, and every number of a float tensor must be finite.

        Raises:
            CheckpointError: naming the first file or tensor that is wrong.
        """
        self.verify_files()
        for kind, name, entry in self.manifest.entries():
            for piece in entry.pieces:
                values = self._stored(entry, piece)[:]
                if not values.isfinite().all():
                    raise self._error(f"{kind} {name}: holds numbers that are not finite")
        _ = (self.state, self.config)

    def _entry(self, kind: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[kind][name]
        except KeyError:
            raise self._error(f"holds no {kind} {name!r}") from None

    def _stored(self, entry: TensorEntry, piece: Piece) -> Any:
        """The piece in its shard, which can be sliced; checked against the manifest."""
        try:
            stored = self._shards.slice(piece.file, piece.key)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{piece.file}: {piece.key}: {error}") from None
        found = (stored.get_dtype(), stored.get_shape())
        expected = (DTYPES[entry.dtype].code, [piece.stop - piece.start])
        if found != expected:
            raise self._error(f"{piece.file}: {piece.key} is {found}, the manifest says {expected}")
        return stored

    def _document(self, name: str) -> str:
        text = self._text(name)
        if hashlib.sha256(text.encode()).hexdigest() != self.manifest.files[name].sha256:
            raise CheckpointError(f"{name}: {_CORRUPT}")
        return text

    def _text(self, name: str) -> str:
        path = self.folder / name
        try:
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{name}: missing; not a checkpoint, or a torn one")
            if path.stat().st_size > LARGEST_DOCUMENT:
                raise CheckpointError(f"{name}: holds {path.stat().st_size} bytes; too many for what it is")
            return path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{name}: cannot be read ({error})") from None

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {str(self.folder)!r}: {problem}")


def find_latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None. Torn ones are named in a warning.

    Ranks must not each look for themselves: one looks and tells the others.

    Args:
        folder: a run folder, or its folder of checkpoints.
    """
    inside = folder / CHECKPOINTS
    for _, path in reversed(step_folders(inside if inside.is_dir() else folder)):
        try:
            CheckpointReader(path)
        except CheckpointError as error:
            logger.warning("%s; skipped", error)
        else:
            return path
    return None


def locate(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest below it if it is a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    if not path.exists() and replaced(path).exists():  # the writer was killed between its two renames
        return replaced(path)
    found = find_latest(path)
    if found is None:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: there is none; give a run folder, or a step-* or best folder in it"
        )
    return found
