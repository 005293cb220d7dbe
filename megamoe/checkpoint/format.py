"""The neutral checkpoint on disk: names of folders and files, the manifest, and what makes it valid.

Nothing here reads or writes tensors; docs/checkpoints.md describes the format for other programs.
"""

import hashlib
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megamoe.checkpoint.dtypes import DTYPES
from megamoe.errors import CheckpointError

FORMAT = "megamoe-checkpoint"
COMPRESSED = "megamoe-compressed"
"""Format of a checkpoint whose experts are compressed, see `megamoe.checkpoint.compressed`."""
VERSION = 1
MANIFEST, CONFIG, STATE = "manifest.json", "config.json", "state.json"
COMPRESSION = "compression.json"
"""Document of a compressed checkpoint alone."""
EXPERT_MODES = ("restore", "on_the_fly", "factored")
"""What becomes of compressed experts on loading: dense weights at once, dense weights of one expert while
it is used, or none, by the factored form of residuals of low rank."""
LARGEST_DOCUMENT = 1 << 28
"""Bytes of the largest JSON document that is written or read."""
BEST = "best"
"""Name of the folder that holds the checkpoint with the best validation figure."""
MOMENTS = ("exp_avg", "exp_avg_sq")
TRAINED = ("weight", *MOMENTS)
KINDS = (*TRAINED, "buffer", "memory", "compressed")
_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 1 << 62  # of a shape whose zeros are taken for ones; what an int64 can count
_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_PLAIN_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")

T = TypeVar("T")


def step_folder(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; names sort as steps do."""
    return f"step-{step:09d}"


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Every ``step-*`` folder in `folder`, complete or not, oldest step first."""
    if not folder.is_dir():
        return []
    named = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def shard_file(rank: int, world_size: int) -> str:
    """Name of the file that writing rank `rank` of `world_size` fills."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def is_compressed(folder: Path) -> bool:
    """Whether `folder` looks like a compressed checkpoint."""
    return (folder / COMPRESSION).is_file()


class Piece(NamedTuple):
    """Elements start..stop of the row-major global tensor are the 1-D tensor `key` of shard `file`."""

    file: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorEntry:
    """One global tensor; `pieces` are sorted and cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def pieces_of(self, start: int, stop: int) -> tuple[Piece, ...]:
        """The pieces that hold elements of start..stop; the others are not looked at."""
        if start >= stop:
            return ()
        first = bisect_right(self.pieces, start, key=lambda piece: piece.stop)
        return self.pieces[first : bisect_left(self.pieces, stop, lo=first, key=lambda piece: piece.start)]


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of one file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Which tensors a checkpoint holds, where their elements are, and what its files must look like.

    Attributes:
        files: every other file of the folder by name.
        tensors: for each kind, the global tensors by name.
        format: `FORMAT` or `COMPRESSED`.
    """

    files: Mapping[str, StoredFile]
    tensors: Mapping[str, Mapping[str, TensorEntry]]
    format: str = FORMAT

    def __post_init__(self) -> None:
        for name in (CONFIG, STATE):
            if name not in self.files:
                raise CheckpointError(f"{MANIFEST}: does not list {name}")
        for name in self.files:
            if not _PLAIN_FILE.fullmatch(name) or name == MANIFEST:
                raise CheckpointError(f"{MANIFEST}: {name!r} is not the plain name of a file beside it")
        used: set[tuple[str, str]] = set()
        for kind, name, entry in self.entries():
            _check_entry(f"{kind} {name!r}", entry)
            self._check_kind(kind, name, entry)
            for piece in entry.pieces:
                if piece.file not in self.files:
                    raise CheckpointError(f"{MANIFEST}: {kind} {name!r} is in unlisted file {piece.file!r}")
                if (piece.file, piece.key) in used:
                    raise CheckpointError(f"{MANIFEST}: {piece.key!r} of {piece.file} is used twice")
                used.add((piece.file, piece.key))
        self._check_sizes()

    def _check_kind(self, kind: str, name: str, entry: TensorEntry) -> None:
        if kind == "compressed" and self.format != COMPRESSED:
            raise CheckpointError(f"{MANIFEST}: {kind} {name!r}: has no place in a {self.format}")
        if kind in TRAINED and entry.dtype != "float32":
            raise CheckpointError(f"{MANIFEST}: {kind} {name!r}: dtype = {entry.dtype!r}: not float32")
        if kind == "memory" and len(entry.shape) != 3:
            raise CheckpointError(f"{MANIFEST}: {kind} {name!r}: shape = {list(entry.shape)}: not [B, M, D]")
        if kind in MOMENTS:
            weight = self.tensors.get("weight", {}).get(name)
            if weight is None or weight.shape != entry.shape:
                raise CheckpointError(
                    f"{MANIFEST}: {kind} {name!r}: there is no weight of that name and shape"
                )

    def _check_sizes(self) -> None:
        """No file is smaller than its pieces, so reading a tensor needs no more memory than the files."""
        n_bytes = dict.fromkeys(self.files, 0)
        for _, _, entry in self.entries():
            for piece in entry.pieces:
                n_bytes[piece.file] += (piece.stop - piece.start) * DTYPES[entry.dtype].itemsize
        for name, needed in n_bytes.items():
            if needed > self.files[name].size:
                raise CheckpointError(
                    f"{MANIFEST}: {name}: holds {self.files[name].size} bytes, its tensors {needed}"
                )

    def entries(self) -> Iterator[tuple[str, str, TensorEntry]]:
        """``(kind, name, entry)`` of every tensor."""
        for kind, tensors in self.tensors.items():
            for name, entry in tensors.items():
                yield kind, name, entry

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        tensors: dict[str, dict[str, Any]] = {kind: {} for kind in self.tensors}
        for kind, name, entry in self.entries():
            pieces = [[piece.file, piece.key, piece.start, piece.stop] for piece in entry.pieces]
            tensors[kind][name] = {"shape": list(entry.shape), "dtype": entry.dtype, "pieces": pieces}
        body = {
            "format": self.format,
            "version": VERSION,
            "files": {name: {"bytes": f.size, "sha256": f.sha256} for name, f in self.files.items()},
            "tensors": tensors,
        }
        return json.dumps(body | {"sha256": _digest(body)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, format: str = FORMAT) -> "Manifest":
        """Parse and validate ``manifest.json``.

        Args:
            text: of the file.
            format: that it must have.

        Raises:
            CheckpointError: not JSON, another format or version, changed since it was written, a field
                of the wrong type, or pieces that do not cover a tensor exactly once.
        """
        body = parse_object(text, MANIFEST)
        if body.get("format") != format:
            raise CheckpointError(
                f"{MANIFEST}: format = {body.get('format')!r}: expected {format!r}{_remedy(body)}"
            )
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{MANIFEST}: version = {body.get('version')!r}: this megamoe reads {VERSION}"
            )
        if body.pop("sha256", None) != _digest(body):
            raise CheckpointError(f"{MANIFEST}: sha256 does not match its content; the file was changed")
        files = {
            name: StoredFile(_typed(file, "bytes", int, name), _typed(file, "sha256", str, name))
            for name, file in _typed(body, "files", dict, MANIFEST).items()
        }
        tensors = _typed(body, "tensors", dict, MANIFEST)
        if unknown := set(tensors) - set(KINDS):
            raise CheckpointError(f"{MANIFEST}: unknown kind of tensor {min(unknown)!r}")
        return cls(files, {kind: _parse_entries(kind, named) for kind, named in tensors.items()}, format)


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The JSON object in `text`; `name` is the file it came from.

    Raises:
        CheckpointError: it is not JSON or not an object, repeats a key, or holds a number that is not finite.
    """
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not valid JSON ({str(error)[:80]})") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{name}: holds no JSON object")
    return body


def _remedy(body: Mapping[str, Any]) -> str:
    restore = "; restore it with tools/convert_checkpoint.py from-compressed"
    return restore if body.get("format") == COMPRESSED else ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _typed(owner: Any, key: str, kind: type[T], where: str) -> T:
    value = owner.get(key) if isinstance(owner, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{MANIFEST}: {where}: {key} = {value!r:.40}: expected {kind.__name__}")
    return value


def _parse_entries(kind: str, named: Any) -> dict[str, TensorEntry]:
    if not isinstance(named, dict):
        raise CheckpointError(f"{MANIFEST}: {kind}: expected tensors by name")
    entries = {}
    for name, entry in named.items():
        where = f"{kind} {name!r}"
        pieces = [_parse_piece(piece, where) for piece in _typed(entry, "pieces", list, where)]
        shape = tuple(_typed(entry, "shape", list, where))
        entries[name] = TensorEntry(shape, _typed(entry, "dtype", str, where), tuple(pieces))
    return entries


def _parse_piece(piece: Any, where: str) -> Piece:
    if not isinstance(piece, list) or [type(value) for value in piece] != [str, str, int, int]:
        raise CheckpointError(f"{MANIFEST}: {where}: piece {piece!r:.80} is not [file, key, start, stop]")
    return Piece(*piece)


def _check_entry(where: str, entry: TensorEntry) -> None:
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{MANIFEST}: {where}: dtype = {entry.dtype!r}: not one of {', '.join(DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in entry.shape):
        raise CheckpointError(f"{MANIFEST}: {where}: shape = {list(entry.shape)!r:.80}: not sizes")
    if (
        len(entry.shape) > _MOST_DIMENSIONS
        or math.prod(max(size, 1) for size in entry.shape) > _MOST_ELEMENTS
    ):
        raise CheckpointError(f"{MANIFEST}: {where}: shape = {list(entry.shape)!r:.80}: too large")
    covered = 0
    for piece in entry.pieces:
        if piece.start != covered or piece.stop <= piece.start:
            raise CheckpointError(f"{MANIFEST}: {where}: pieces overlap or leave a gap at element {covered}")
        covered = piece.stop
    if covered != entry.numel:
        raise CheckpointError(
            f"{MANIFEST}: {where}: pieces hold {covered} elements, shape {list(entry.shape)} {entry.numel}"
        )
