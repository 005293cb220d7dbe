"""Write files that torch.load reads, one tensor at a time: torch.save wants all of them in memory."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch._utils import _rebuild_tensor_v2

from megamoe.checkpoint.dtypes import DTYPES, torch_dtype
from megamoe.convert.progress import Progress
from megamoe.convert.tensors import LazyTensor
from megamoe.convert.torch_file import STORAGE_DTYPES
from megamoe.errors import CheckpointError

_STORAGES = {dtype: getattr(torch, storage) for storage, dtype in STORAGE_DTYPES.items()}
# Bytes in a zip file: before a member's name, of its sizes in zip64, and of a field that pads.
_LOCAL_HEADER, _ZIP64_SIZES, _EXTRA_HEADER = 30, 20, 4
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor to write that is made of parts.

    Attributes:
        shape: its shape.
        dtype: name of their type.
        parts: its numbers in row-major order, 1-D tensors of any type that are made when they are written.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: Callable[[], Iterable[torch.Tensor]]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()


def write_torch_file(path: Path, content: Any, *, progress: Progress | None = None) -> None:
    """Write `content` as torch.save would. A tensor that comes twice is written once, as a tied one.

    Args:
        content: plain data with `LazyTensor` or `NewTensor` in the place of tensors.
        progress: told the bytes of every part that was written.

    Raises:
        CheckpointError: a tensor is not what it promised to be.
        OSError: the disk refuses.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    with path.open("xb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            archive.writestr("archive/byteorder", "little")
            for key, tensor in enumerate(pickler.tensors):
                with archive.open(_aligned_member(archive, key), "w", force_zip64=True) as member:
                    _write_parts(member, tensor, progress)
            archive.writestr("archive/version", "3\n")
        file.flush()
        os.fsync(file.fileno())


def _aligned_member(archive: zipfile.ZipFile, key: int) -> zipfile.ZipInfo:
    """The next member, whose numbers begin at a multiple of 64 bytes, so that they can be memory-mapped."""
    member = zipfile.ZipInfo(f"archive/data/{key}")
    header = _LOCAL_HEADER + len(member.filename) + _ZIP64_SIZES + _EXTRA_HEADER
    padding = -(archive.start_dir + header) % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    return member


def _write_parts(member: IO[bytes], tensor: NewTensor, progress: Progress | None) -> None:
    written = 0
    for part in tensor.parts():
        written += part.numel()
        member.write(part.detach().to(torch_dtype(tensor.dtype)).flatten().view(torch.uint8).numpy().data)
        if progress:
            progress(part.numel() * DTYPES[tensor.dtype].itemsize)
    if written != tensor.numel:
        raise CheckpointError(f"{written} numbers were read for a tensor of {tensor.numel}")


@dataclass(frozen=True)
class _Storage:
    """Numbers `key` of the file."""

    key: int
    tensor: NewTensor


class _Pickler(pickle.Pickler):
    """Pickles a `NewTensor` as torch.save does a tensor that owns its storage."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[NewTensor] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, LazyTensor):
            return self.reduce(NewTensor(value.shape, value.dtype, lambda: [value.checked()]))
        return self.reduce(value) if isinstance(value, NewTensor) else NotImplemented

    def reduce(self, value: NewTensor) -> tuple[Any, ...]:
        """How `value` is made when it is read."""
        storage = _Storage(len(self.tensors), value)
        self.tensors.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        return _rebuild_tensor_v2, (storage, 0, value.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        return "storage", _STORAGES[tensor.dtype], str(value.key), "cpu", tensor.numel
