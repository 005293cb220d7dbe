"""Write files that torch.load reads, one tensor at a time: torch.save wants all of them in memory."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor to write.

    Attributes:
        shape: its shape.
        dtype: of its numbers.
        parts: its numbers in row-major order, 1-D tensors of any type that are made when they are written.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[torch.Tensor]]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()


def write_torch_file(path: Path, content: Any) -> None:
    """Write `content`, plain data with `NewTensor` in the place of tensors, as torch.save would.

    Raises:
        ValueError: the parts of a tensor are not as many numbers as it has.
        OSError: the disk refuses.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    with zipfile.ZipFile(path, "x") as file:
        file.writestr("archive/data.pkl", buffer.getvalue())
        file.writestr("archive/byteorder", "little")
        for key, tensor in enumerate(pickler.tensors):
            with file.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                written = 0
                for part in tensor.parts():
                    written += part.numel()
                    member.write(part.to(tensor.dtype).contiguous().view(torch.uint8).numpy().data)
            if written != tensor.numel:
                raise ValueError(f"{written} numbers for a tensor of {tensor.numel}")
        file.writestr("archive/version", "3\n")


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
        if not isinstance(value, NewTensor):
            return NotImplemented
        storage = _Storage(len(self.tensors), value)
        self.tensors.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        return _rebuild_tensor_v2, (storage, 0, value.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        return "storage", _STORAGES[tensor.dtype], str(value.key), "cpu", tensor.numel
