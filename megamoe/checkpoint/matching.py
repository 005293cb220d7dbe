"""Whether a checkpoint belongs to a model, and if not, the first thing that differs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from megamoe.checkpoint.dtypes import DTYPES, dtype_name
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import ModelConfig, MoEConfig, RouterConfig
from megamoe.errors import CheckpointError
from megamoe.models.transformer_xl import Backbone
from megamoe.moe.routers import resolve_options
from megamoe.parallel.placement import global_shapes, saved_buffers

# Options that a model's weights depend on, even where the shapes do not tell. Others may change on the way:
# dropout, lengths of segment and memory, k and its schedule, losses, options of the routing policy.
_MODEL_OPTIONS = (
    "vocab_size", "n_layers", "d_model", "n_heads", "d_head", "d_inner", "pre_norm", "cutoffs", "div_val",
    "d_embed", "tie_weights", "tie_projections",
)  # fmt: skip
_MOE_OPTIONS = ("n_experts", "d_expert")

Shapes = Mapping[str, tuple[int, ...]]


def require_same_options(reader: CheckpointReader, model: ModelConfig, moe: MoEConfig) -> None:
    """Refuse a checkpoint whose weights mean something else in a model of this config.

    Args:
        reader: the checkpoint.
        model: config of the model at hand, its vocabulary size resolved.
        moe: config of its mixture layers.

    Raises:
        CheckpointError: the first option that differs, both values, and the remedy.
    """
    saved = reader.config
    for (name, here), (_, there) in zip(_options(model, moe), _options(saved.model, saved.moe), strict=True):
        if here != there:
            raise _other_option(reader, name, here, there)


def require_kind_of_number(name: str, dtype: str, values: torch.Tensor, folder: Path) -> None:
    """Refuse whole numbers in the place of `values` of a model that have fractions, and the reverse.

    Raises:
        CheckpointError: naming the tensor and its type.
    """
    if DTYPES[dtype].is_floating != values.is_floating_point():
        raise CheckpointError(
            f"{name}: {dtype} in checkpoint {str(folder)!r}, but the model has {dtype_name(values.dtype)}"
        )


def require_same_tensors(
    reader: CheckpointReader, model: Backbone, *, apart_from: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors of `model`.

    Args:
        reader: the checkpoint.
        model: the model at hand.
        apart_from: beginnings of the names that do not matter, in either.

    Raises:
        CheckpointError: the option of the router that differs; without such an option the first tensor that
            is missing, has another shape, or is unknown.
    """
    buffers = saved_buffers(model)
    try:
        _require_same_shapes(reader, "weight", global_shapes(model), apart_from)
        _require_same_shapes(reader, "buffer", {name: tuple(b.shape) for name, b in buffers.items()})
    except CheckpointError as error:
        if differing := _differing_options(model.moe_config.router, reader.config.moe.router):
            option, (here, there) = min(differing.items())
            raise _other_option(reader, f"moe.router.{option}", here, there, f" ({error})") from None
        raise
    for name, buffer in buffers.items():
        require_kind_of_number(name, reader.manifest.tensors["buffer"][name].dtype, buffer, reader.folder)


def _options(model: ModelConfig, moe: MoEConfig) -> Iterator[tuple[str, object]]:
    yield from ((f"model.{name}", getattr(model, name)) for name in _MODEL_OPTIONS)
    yield "moe.layers", moe.layer_indices(model.n_layers)
    yield from ((f"moe.{name}", getattr(moe, name)) for name in _MOE_OPTIONS)
    yield "moe.router.name", moe.router.name


def _differing_options(here: RouterConfig, there: RouterConfig) -> dict[str, tuple[object, object]]:
    """Options of the policy by name, with both values. Most do not change its tensors, and may differ."""
    ours, theirs = asdict(resolve_options(here)), asdict(resolve_options(there))
    return {name: (ours[name], theirs.get(name)) for name in ours if ours[name] != theirs.get(name)}


def _other_option(
    reader: CheckpointReader, name: str, here: object, there: object, why: str = ""
) -> CheckpointError:
    return CheckpointError(
        f"{name} = {here!r}: checkpoint {str(reader.folder)!r} was trained with {there!r};"
        f" set {name}={_written(there)} or choose another checkpoint{why}"
    )


def _written(value: object) -> str:
    """`value` as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _require_same_shapes(
    reader: CheckpointReader, kind: str, shapes: Shapes, apart_from: tuple[str, ...] = ()
) -> None:
    where = f"checkpoint {str(reader.folder)!r}"
    saved = {name for name in reader.names(kind) if not name.startswith(apart_from)}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(apart_from)}
    for name, shape in shapes.items():
        if name not in saved:
            raise CheckpointError(f"{name}: not in {where}, but the model has it")
        if shape != reader.shape(kind, name):
            raise CheckpointError(
                f"{name}: {list(shape)} in the model, {list(reader.shape(kind, name))} in {where}"
            )
    if unknown := saved - set(shapes):
        raise CheckpointError(f"{min(unknown)}: in {where}, but the model has no such {kind}")
