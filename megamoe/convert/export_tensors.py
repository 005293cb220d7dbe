"""Read exported models as streams of tensors."""

from typing import TYPE_CHECKING

from megamoe.checkpoint.exported import ExportReader
from megamoe.convert.tensors import LazyTensor

if TYPE_CHECKING:
    import torch


def export_tensor(reader: ExportReader, kind: str, name: str) -> LazyTensor:
    """A tensor of an exported model as one of `kind`.

    Raises:
        CheckpointError: it is missing.
    """
    shape, dtype = reader.describe(name)

    def load() -> "torch.Tensor":
        values = reader.tensor(name, shape)
        reader.release(values.nbytes)
        return values

    return LazyTensor(kind, name, shape, dtype, load)
