"""Which tensors the model of a config has."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megamoe.checkpoint.dtypes import DTYPES
from megamoe.checkpoint.format import MOMENTS
from megamoe.checkpoint.load import empty_model
from megamoe.config.schema import RunConfig
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError
from megamoe.parallel.placement import saved_buffers


class ModelTensor(NamedTuple):
    """A tensor that a model has: weight or buffer, its shape, and whether its numbers have fractions."""

    kind: str
    shape: tuple[int, ...]
    is_floating: bool


def model_tensors(config: RunConfig, n_weights: int) -> dict[str, ModelTensor]:
    """The tensors of the model by name. Allocates none of them.

    Args:
        n_weights: numbers that the checkpoint holds, which bounds the model.

    Raises:
        CheckpointError: the config describes no model that the checkpoint could hold.
    """
    model = empty_model(config, n_weights)
    tensors: dict[str, tuple[str, torch.Tensor]] = {
        name: ("weight", p) for name, p in model.named_parameters()
    }
    tensors |= {name: ("buffer", b) for name, b in saved_buffers(model).items()}
    return {
        name: ModelTensor(kind, tuple(empty.shape), empty.is_floating_point())
        for name, (kind, empty) in tensors.items()
    }


def require_tensors_of(config: RunConfig, tensors: Sequence[LazyTensor]) -> None:
    """Refuse tensors that are not exactly those of the model: weights and buffers, and moments of weights.

    Raises:
        CheckpointError: the first that is missing, unknown, of another shape, or of whole numbers where the
            model has others.
    """
    n_numbers = sum(tensor.numel for tensor in tensors)
    expected = {(found.kind, name): found for name, found in model_tensors(config, n_numbers).items()}
    missing = set(expected)
    for tensor in tensors:
        kind = "weight" if tensor.kind in MOMENTS else tensor.kind
        wanted = expected.get((kind, tensor.name))
        if wanted is None or wanted.shape != tensor.shape:
            what = "no such tensor" if wanted is None else f"shape {list(wanted.shape)}"
            raise CheckpointError(
                f"{tensor.kind} {tensor.name}: shape {list(tensor.shape)}, but the config's model has {what}"
            )
        if wanted.is_floating != DTYPES[tensor.dtype].is_floating:
            raise CheckpointError(f"{tensor.kind} {tensor.name}: {tensor.dtype} is no type for it")
        missing.discard((tensor.kind, tensor.name))
    if missing:
        raise CheckpointError(f"{' '.join(min(missing))}: missing, but the config's model has it")
