"""Types of numbers by name, and empty tensors of them.

Whatever describes a tensor (manifest, header, listing) calls its type by name. So a checkpoint is listed
without torch, which takes seconds to import: it is imported here, when the first tensor is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """A type of numbers.

    Attributes:
        code: what a safetensors header calls it.
        itemsize: bytes of a number.
        is_floating: whether it has fractions.
    """

    code: str
    itemsize: int
    is_floating: bool = False


DTYPES = {
    "float64": Dtype("F64", 8, is_floating=True),
    "float32": Dtype("F32", 4, is_floating=True),
    "float16": Dtype("F16", 2, is_floating=True),
    "bfloat16": Dtype("BF16", 2, is_floating=True),
    "int64": Dtype("I64", 8),
    "int32": Dtype("I32", 4),
    "int16": Dtype("I16", 2),
    "int8": Dtype("I8", 1),
    "uint8": Dtype("U8", 1),
    "bool": Dtype("BOOL", 1),
}
"""The types that a checkpoint may hold, by the names that torch and the manifest have for them."""


def dtype_name(dtype: "torch.dtype") -> str:
    """The name of `dtype`: ``torch.float32`` is ``float32``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> "torch.dtype":
    """The type that torch knows by `name`, one of `DTYPES`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def empty(shape: Sequence[int], dtype: str) -> "torch.Tensor":
    """A tensor in host memory whose numbers are not set."""
    import torch

    return torch.empty(tuple(shape), dtype=torch_dtype(dtype))
