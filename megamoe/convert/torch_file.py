"""Read files of torch.save: their structure at once, their tensors when asked, never their code."""

import math
import operator
import os
import struct
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megamoe.checkpoint.dtypes import DTYPES, empty, torch_dtype
from megamoe.convert.pickles import LARGEST_PICKLE, Name, Vocabulary, unpickle
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STRUCTS = {"float64": "<d", "float32": "<f", "int64": "<q", "int32": "<i"}
_BLOCK = 1 << 22
_MOST_DIMENSIONS = 16
_LARGEST_SIZE = 1 << 48
# Where the lengths of name and extra field stand, which end a member's header.
_SIZES_OF_HEADER = 26
# What zipfile raises on damaged archives.
_DAMAGE = (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Tensors that share their numbers, as tied weights do, are equal.

    Attributes:
        storage: name of its numbers in the file.
        dtype: name of their type.
        offset: first of them, counted in numbers.
        shape: its shape.
        stride: distance of neighbours along each axis, in numbers.
        requires_grad: whether it was trained.
        file: where it lies.
    """

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = field(compare=False)
    file: "TorchFile"

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers follow each other in row-major order."""
        expected = accumulate(self.shape[:0:-1], operator.mul, initial=1)
        return all(
            n == 1 or step == wanted
            for n, step, wanted in zip(self.shape[::-1], self.stride[::-1], expected, strict=False)
        )

    def load(self) -> "torch.Tensor":
        """The tensor, contiguous."""
        extent = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        numbers = self.file.read(self.storage, self.dtype, self.offset, extent if 0 not in self.shape else 0)
        return numbers.as_strided(self.shape, self.stride).contiguous()


class TorchFile:
    """A file written by torch.save, torch 1.6 or later. Opening reads its list of contents.

    Args:
        path: the file.
        modules: Python modules whose classes it may mention; a name ending in ``.*`` allows those below.

    Raises:
        CheckpointError: it is no such file, damaged, or lies about its sizes.
    """

    def __init__(self, path: Path, modules: Collection[str] = ()) -> None:
        self.path = path
        self._modules = modules
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise self._error("is not a plain file")
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise self._error(
                f"cannot be read ({error}); load and save files of torch before 1.6 with a newer one"
            ) from None
        self._verified: set[str] = set()
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) != len(members):
            raise self._error("holds two members of one name")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise self._error("holds compressed members, which torch.save never writes")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise self._error("its members claim more bytes than it has")
        roots = [name.removesuffix("/data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise self._error("holds no data.pkl of its own; it was not written by torch.save")
        self._root = roots[0]
        if f"{self._root}/byteorder" in self._members and self._bytes("byteorder") != b"little":
            raise self._error("its numbers are big-endian; save it on a little-endian machine")

    def structure(self) -> Any:
        """What was saved: plain data, `megamoe.convert.pickles.Record`, and `StoredTensor`.

        Raises:
            CheckpointError: it mentions a class or function that is not allowed, or it is damaged.
        """
        functions: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _empty_dict,
            "__builtin__.set": _as_list,
            "builtins.set": _as_list,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
        }
        try:
            return unpickle(self._bytes("data.pkl"), Vocabulary(self._is_known, functions, self._storage))
        except CheckpointError as error:
            raise self._error(str(error)) from None

    def read(self, storage: str, dtype: str, start: int, count: int) -> "torch.Tensor":
        """`count` numbers of a storage from number `start` on, 1-D.

        Raises:
            CheckpointError: the storage's checksum is wrong, or the file has become shorter.
        """
        itemsize = DTYPES[dtype].itemsize
        raw = empty([count * itemsize], "uint8")
        self._fill(raw.numpy().data, storage, start * itemsize)
        return raw.view(torch_dtype(dtype))

    def number(self, stored: StoredTensor) -> float:
        """The number in a tensor of one; needs no torch.

        Raises:
            CheckpointError: as `read`, or it is no single number.
        """
        if stored.numel != 1 or stored.dtype not in _STRUCTS:
            raise self._error(f"storage {stored.storage}: a single number was expected")
        raw = bytearray(DTYPES[stored.dtype].itemsize)
        self._fill(memoryview(raw), stored.storage, stored.offset * len(raw))
        return struct.unpack(_STRUCTS[stored.dtype], raw)[0]

    def _fill(self, view: memoryview, storage: str, begin: int) -> None:
        """Read the bytes of a storage from `begin` on into `view`, comparing the storage's checksum."""
        member = self._member(f"data/{storage}")
        try:
            # A checksum is of a whole storage, so the first look at a part of one reads all of it.
            whole = len(view) == member.file_size
            if not whole and storage not in self._verified:
                with self._zip.open(member) as file:
                    while file.read(_BLOCK):
                        pass
            self._verified.add(storage)
            with self._zip.open(member) if whole else self._open_at(member, begin) as file:
                for first in range(0, len(view), _BLOCK):
                    view[first : first + _BLOCK] = file.read(min(_BLOCK, len(view) - first))
        except _DAMAGE as error:
            raise self._error(f"storage {storage}: cannot be read ({error})") from None

    def _open_at(self, member: zipfile.ZipInfo, begin: int) -> IO[bytes]:
        """The file at byte `begin` of a verified member. (Within a member, zipfile seeks by reading.)"""
        file = self.path.open("rb")
        file.seek(member.header_offset + _SIZES_OF_HEADER)
        name_and_extra = struct.unpack("<HH", file.read(4))
        file.seek(sum(name_and_extra) + begin, os.SEEK_CUR)
        return file

    def _is_known(self, name: Name) -> bool:
        if name.module == "torch" and name.name in STORAGE_DTYPES:
            return True
        return any(
            name.module == allowed or (allowed.endswith(".*") and name.module.startswith(allowed[:-1]))
            for allowed in self._modules
        )

    def _storage(self, identity: Any) -> tuple[str, str, int]:
        """Key, dtype and length of the storage that a persistent id names."""
        kind, storage_type, key, _, numel = identity
        known = isinstance(storage_type, Name) and storage_type.name in STORAGE_DTYPES
        if kind != "storage" or not known or not isinstance(key, str) or type(numel) is not int:
            raise ValueError("not a storage")
        dtype = STORAGE_DTYPES[storage_type.name]
        if numel * DTYPES[dtype].itemsize != self._member(f"data/{key}").file_size:
            raise ValueError(f"storage {key} is not as long as it claims")
        return key, dtype, numel

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        key, dtype, available = storage
        if not (type(shape) is type(stride) is tuple and len(shape) == len(stride) <= _MOST_DIMENSIONS):
            raise ValueError(f"tensor of storage {key} has no shape")
        if not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in (offset, *shape, *stride)):
            raise ValueError(f"tensor of storage {key} has impossible sizes")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last >= available or math.prod(shape) > available):
            raise ValueError(f"tensor of storage {key} is larger than its storage")
        return StoredTensor(key, dtype, offset, shape, stride, bool(rest and rest[0] is True), self)

    def _bytes(self, name: str) -> bytes:
        member = self._member(name)
        if member.file_size > LARGEST_PICKLE:
            raise self._error(f"{name}: {member.file_size:,} bytes are more than any model needs")
        try:
            return self._zip.read(member)
        except _DAMAGE as error:
            raise self._error(f"{name}: cannot be read ({error})") from None

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._members[f"{self._root}/{name}"]
        except KeyError:
            raise self._error(f"has no member {name[:80]!r}") from None

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"file {str(self.path)!r}: {problem}")


def _parameter(data: Any, requires_grad: Any, *rest: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("parameter that is not a tensor")
    return replace(data, requires_grad=requires_grad is True)


def _empty_dict() -> dict[Any, Any]:
    return {}


def _as_list(items: Any) -> list[Any]:
    if not isinstance(items, list):
        raise ValueError("set that is not made of a list")
    return items
