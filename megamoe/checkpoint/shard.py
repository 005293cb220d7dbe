"""One shard: a safetensors file of flat slices of global tensors, hashed while it is written."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megamoe.checkpoint.dtypes import DTYPES, dtype_name, torch_dtype
from megamoe.checkpoint.format import (
    FORMAT,
    LARGEST_DOCUMENT,
    MANIFEST,
    TRAINED,
    Manifest,
    Piece,
    StoredFile,
    TensorEntry,
)
from megamoe.errors import CheckpointError

# Name, shape, type, and what gives the values.
NamedTensor = tuple[str, tuple[int, ...], str, Callable[[], torch.Tensor]]


class Part(Protocol):
    """A flat range of a global tensor, whose values are asked for when it is its turn to be written."""

    @property
    def kind(self) -> str:
        """One of `format.KINDS`."""

    @property
    def name(self) -> str:
        """Global name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def start(self) -> int:
        """First element of the range."""

    @property
    def stop(self) -> int:
        """Element after the last."""

    @property
    def dtype(self) -> str:
        """Type on disk; `stored_dtype` tells which."""

    def on_host(self) -> torch.Tensor:
        """The values in that type, 1-D and contiguous in host memory."""


def stored_dtype(kind: str, dtype: str) -> str:
    """Type on disk of a tensor of `kind`: fp32 for weights and moments, whatever they are trained in."""
    return "float32" if kind in TRAINED else dtype


@dataclass(frozen=True)
class Slice:
    """A `Part` whose values exist already.

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
    def dtype(self) -> str:
        """Type on disk."""
        return stored_dtype(self.kind, dtype_name(self.values.dtype))

    def on_host(self) -> torch.Tensor:
        """The values as they are written; copied only where they must be."""
        return self.values.detach().to("cpu", torch_dtype(self.dtype)).contiguous()


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


def write_shard(path: Path, parts: Iterable[Part]) -> Shard:
    """Write `parts` to `path` and sync it. One part at a time is copied to host memory."""
    # Larger elements first keeps every part aligned to the size of its elements.
    ordered = sorted(parts, key=lambda part: -DTYPES[part.dtype].itemsize)
    file = write_file(path, _safetensors(ordered))
    return Shard(path.name, file, tuple(_entry(path.name, part) for part in ordered))


def write_file(path: Path, chunks: Iterable[Any]) -> StoredFile:
    """Create `path` from bytes-like `chunks` and sync it to the disk."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            sha256.update(chunk)
            size += file.write(chunk)
            del chunk  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(size, sha256.hexdigest())


def merge(shards: Iterable[Shard], documents: dict[str, StoredFile], format: str = FORMAT) -> Manifest:
    """The manifest of a folder of this format with these shards and JSON documents.

    Raises:
        CheckpointError: together the shards do not hold every element of every tensor exactly once.
    """
    files = dict(documents)
    found: dict[str, dict[str, tuple[TensorEntry, list[Piece]]]] = {}
    for shard in shards:
        files[shard.name] = shard.file
        for kind, name, entry in shard.entries:
            known, pieces = found.setdefault(kind, {}).setdefault(name, (entry, []))
            if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"{kind} {name}: {entry.dtype} {list(entry.shape)} in {shard.name},"
                    f" {known.dtype} {list(known.shape)} in another shard"
                )
            pieces += entry.pieces
    tensors = {
        kind: {
            name: TensorEntry(entry.shape, entry.dtype, tuple(sorted(pieces, key=lambda piece: piece.start)))
            for name, (entry, pieces) in named.items()
        }
        for kind, named in found.items()
    }
    return Manifest(files, tensors, format)


def write_documents(
    folder: Path, documents: dict[str, str], shards: Sequence[Shard], format: str = FORMAT
) -> None:
    """Complete a folder that holds `shards`: the JSON documents by name, then the manifest.

    Raises:
        CheckpointError: together the shards do not hold every element of every tensor exactly once, or there
            are so many pieces that nobody could read the manifest.
    """
    written = {name: write_file(folder / name, [text.encode()]) for name, text in documents.items()}
    manifest = merge(shards, written, format).to_json().encode()
    if len(manifest) > LARGEST_DOCUMENT:
        raise CheckpointError(
            f"{MANIFEST}: {len(manifest)} bytes for {len(shards)} shards: {LARGEST_DOCUMENT} can be read;"
            " train at ZeRO stage 1 or 2, which cut fewer tensors, or on fewer ranks"
        )
    write_file(folder / MANIFEST, [manifest])


def _key(part: Part) -> str:
    """Name inside the shard, which tells what the values are even without the manifest."""
    return f"{part.kind}/{part.name}[{part.start}:{part.stop}]"


def _entry(file: str, part: Part) -> tuple[str, str, TensorEntry]:
    # A tensor without elements has no piece.
    pieces = (Piece(file, _key(part), part.start, part.stop),) if part.stop > part.start else ()
    return part.kind, part.name, TensorEntry(part.shape, part.dtype, pieces)


def _safetensors(parts: Sequence[Part]) -> Iterator[Any]:
    return safetensors_file(
        [(_key(part), (part.stop - part.start,), part.dtype, part.on_host) for part in parts]
    )


def safetensors_file(tensors: Sequence[NamedTensor]) -> Iterator[Any]:
    """The chunks of a safetensors file: length of the header, the header, the values in its order.

    Args:
        tensors: name, shape, type, and what gives the values, contiguous in host memory. Each is asked for
            when its chunk is; those of larger elements must come first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in tensors:
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": DTYPES[dtype].code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, _, _, load in tensors:
        yield load().view(-1).view(torch.uint8).numpy()
