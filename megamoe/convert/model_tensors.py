"""Which tensors the model of a config has."""

from collections.abc import Iterable

import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.config.schema import RunConfig
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.placement import saved_buffers


def model_tensors(config: RunConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By name, the kind (weight or buffer) and shape of each tensor of the model. Allocates none of them.

    Raises:
        CheckpointError: no model can be so large.
        ConfigError: a setting does not fit the others.
    """
    try:
        with torch.device("meta"):
            model = TransformerXL(config.model, config.moe, seed=config.training.seed)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"model: cannot be built ({str(error)[:80]})") from None
    tensors = {name: ("weight", tuple(p.shape)) for name, p in model.named_parameters()}
    return tensors | {name: ("buffer", tuple(b.shape)) for name, b in saved_buffers(model).items()}


def require_tensors_of(config: RunConfig, tensors: Iterable[LazyTensor]) -> None:
    """Refuse tensors that are not exactly those of the model: weights and buffers, and moments of weights.

    Raises:
        CheckpointError: the first that is missing, unknown, or of another shape.
    """
    expected = {(kind, name): shape for name, (kind, shape) in model_tensors(config).items()}
    missing = set(expected)
    for tensor in tensors:
        kind = "weight" if tensor.kind in MOMENTS else tensor.kind
        shape = expected.get((kind, tensor.name))
        if shape != tensor.shape:
            what = "no such tensor" if shape is None else f"shape {list(shape)}"
            raise CheckpointError(
                f"{tensor.kind} {tensor.name}: shape {list(tensor.shape)}, but the config's model has {what}"
            )
        missing.discard((tensor.kind, tensor.name))
    if missing:
        raise CheckpointError(f"{' '.join(min(missing))}: missing, but the config's model has it")
