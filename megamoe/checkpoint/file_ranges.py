"""Numbers of safetensors files, read straight into memory that is there already.

Pages of mapped files (`MappedFiles`) stay in the memory of the process until they are closed. Here nothing
stays, nothing is copied twice, and other threads compute meanwhile. So one expert after another is served.
"""

import json
import os
from functools import cache, lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megamoe.checkpoint.dtypes import DTYPES, dtype_name
from megamoe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 256
"""Files that stay open, of the 1024 that a process may have by default."""
_LENGTH_BYTES = 8
"""A file begins with the length of its header, little-endian, then the header, then the numbers."""


class _Place(NamedTuple):
    """Where a tensor is: what the file calls its type, its first byte and the one after its last."""

    code: str
    begin: int
    end: int


class FileRanges:
    """The safetensors files of a folder, whose names and hashes have been checked. Any thread may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened = lru_cache(_OPEN_FILES)(self._open)
        self._places = cache(self._read_header)

    def read(self, file: str, key: str, start: int, into: "torch.Tensor") -> None:
        """Fill a contiguous tensor in host memory from element `start` of tensor `key`, row-major.

        Raises:
            CheckpointError: the file cannot be read, or has no such numbers.
        """
        try:
            code, begin, end = self._places(file)[key]
            first = begin + start * into.itemsize
            if code != DTYPES[dtype_name(into.dtype)].code or first + into.nbytes > end:
                raise ValueError(f"holds {code}, {end - begin} bytes")
            _fill(self._opened(file).fileno(), into, first)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"{file}: {key}: cannot be read ({error})") from None

    def _open(self, file: str) -> FileIO:
        return FileIO(self._folder / file)

    def _read_header(self, file: str) -> dict[str, _Place]:
        handle = self._opened(file)
        length = int.from_bytes(os.pread(handle.fileno(), _LENGTH_BYTES, 0), "little")
        header = os.pread(handle.fileno(), min(length, os.fstat(handle.fileno()).st_size), _LENGTH_BYTES)
        data = _LENGTH_BYTES + length
        return {
            key: _Place(entry["dtype"], *(data + offset for offset in entry["data_offsets"]))
            for key, entry in json.loads(header).items()
            if key != "__metadata__"
        }


def _fill(file: int, into: "torch.Tensor", first: int) -> None:
    import torch

    left = into.view(-1).view(torch.uint8).numpy().data
    while left:
        n_read = os.preadv(file, [left], first)
        if not n_read:
            raise ValueError("it ends too early")
        left, first = left[n_read:], first + n_read
