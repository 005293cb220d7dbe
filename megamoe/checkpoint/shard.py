"""One shard: a safetensors file of flat slices of global tensors, hashed while it is written."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.format import DTYPES, Manifest, Piece, StoredFile, TensorEntry, dtype_name
from megamoe.errors import CheckpointError


@dataclass(frozen=True)
class Slice:
    """A flat range of a global tensor on its way into a shard.

    Attributes:
        kind: one of `format.KINDS`.
        name: global name.
        shape: shape of the whole tensor.
        start: first element of the range.
        values: the range, 1-D, on any device.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor

    @property
    def stop(self) -> int:
        """Element after the last."""
        return self.start + self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type on disk: fp32 for weights and moments, whatever they are trained in."""
        return self.values.dtype if self.kind in ("buffer", "memory") else torch.float32

    @property
    def key(self) -> str:
        """Name inside the shard, which tells what the values are even without the manifest."""
        return f"{self.kind}/{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Shard:
    """What the manifest must know of one written shard.

    Attributes:
        name: file name.
        file: its size and hash.
        entries: ``(kind, name, entry)`` with the one piece of the tensor that is in this shard.
    """

    name: str
    file: StoredFile
    entries: tuple[tuple[str, str, TensorEntry], ...]


def write_shard(path: Path, slices: Iterable[Slice]) -> Shard:
    """Write `slices` to `path` and sync it. One slice at a time is copied to host memory."""
    # Larger elements first keeps every slice aligned to the size of its elements.
    ordered = sorted(slices, key=lambda part: -part.dtype.itemsize)
    file = write_file(path, _safetensors(ordered))
    return Shard(path.name, file, tuple(_entry(path.name, part) for part in ordered))


def write_file(path: Path, chunks: Iterable[Any]) -> StoredFile:
    """Create `path` from bytes-like `chunks` and sync it to the disk."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            sha256.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(size, sha256.hexdigest())


def merge(shards: Iterable[Shard], documents: dict[str, StoredFile]) -> Manifest:
    """The manifest of a folder with these shards and JSON documents.

    Raises:
        CheckpointError: together the shards do not hold every element of every tensor exactly once.
    """
    files = dict(documents)
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for shard in shards:
        files[shard.name] = shard.file
        for kind, name, entry in shard.entries:
            known = tensors.setdefault(kind, {}).setdefault(name, TensorEntry(entry.shape, entry.dtype, ()))
            if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"{kind} {name}: {entry.dtype} {list(entry.shape)} in {shard.name},"
                    f" {known.dtype} {list(known.shape)} in another shard"
                )
            pieces = sorted((*known.pieces, *entry.pieces), key=lambda piece: piece.start)
            tensors[kind][name] = TensorEntry(entry.shape, entry.dtype, tuple(pieces))
    return Manifest(files, tensors)


def _entry(file: str, part: Slice) -> tuple[str, str, TensorEntry]:
    piece = Piece(file, part.key, part.start, part.stop)
    return part.kind, part.name, TensorEntry(part.shape, dtype_name(part.dtype), (piece,))


def _safetensors(slices: Sequence[Slice]) -> Iterator[Any]:
    """The file's chunks: length of the header, the header, the slices in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in slices:
        begin, end = end, end + part.values.numel() * part.dtype.itemsize
        code = DTYPES[dtype_name(part.dtype)][1]
        shape = [part.values.numel()]
        header[part.key] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for part in slices:
        yield part.values.detach().to("cpu", part.dtype).contiguous().view(torch.uint8).numpy()
