"""A checkpoint as a model to use: no DeepSpeed, no process group."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.compressed import (
    CompressedReader,
    keep_compressed,
    open_reader,
    replaced_names,
    require_mode,
    restored_tensors,
)
from megamoe.checkpoint.exported import ExportReader, is_export
from megamoe.checkpoint.format import CONFIG
from megamoe.checkpoint.matching import require_kind_of_number, require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import RunConfig
from megamoe.data.tokenizers import Tokenizer
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.models.model_of import model_of
from megamoe.models.transformer_xl import Backbone
from megamoe.parallel.placement import saved_buffers

NOTHING = r"(?!)"
"""A pattern that no name fits."""


def load_model(
    path: str | Path, *, verify: bool = True, experts: str = "restore", without: str = NOTHING
) -> Any:
    """The trained model in evaluation mode, on the CPU in fp32, with all experts.

    It is a `TransformerXL`, or a `Classifier` where the run has fine-tuned one.

    Args:
        path: a run folder, whose newest checkpoint is taken; a ``step-*`` or ``best`` folder; or an exported
            or a compressed folder.
        verify: compare the files with their hashes first, so that no damaged number is loaded; an export
            whose hashes were removed is taken as it is.
        experts: what becomes of compressed ones, one of `megamoe.checkpoint.format.EXPERT_MODES`.
        without: pattern of the names of parameters that are left on the meta device, where they occupy no
            memory, for whoever reads them later.

    Raises:
        CheckpointError: there is no complete checkpoint, it is not what its manifest and config say, or its
            experts cannot be loaded so.
    """
    reader, left = open_model(path), re.compile(without)
    require_mode(experts, reader)
    if isinstance(reader, ExportReader):
        return _load_export(reader, verify, left)
    if verify:
        reader.verify_files()
    n_weights = sum(math.prod(reader.shape("weight", name)) for name in reader.names("weight"))
    model = _model_of(reader.config, n_weights, reader.folder)
    replaced = replaced_names(reader)
    require_same_tensors(reader, model, apart_from=replaced)
    tensors = {
        name: parameter if left.fullmatch(name) else reader.tensor("weight", name)
        for name, parameter in model.named_parameters()
        if name not in replaced
    }
    for name, buffer in saved_buffers(model).items():
        tensors[name] = reader.tensor("buffer", name).to(buffer.dtype)
    if isinstance(reader, CompressedReader):
        if experts == "restore":
            tensors |= restored_tensors(reader)
        else:
            keep_compressed(reader, model, experts)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def open_model(path: str | Path) -> CheckpointReader | ExportReader:
    """What there is to know of the model of `path` before it is loaded; see `load_model`.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    return ExportReader(Path(path)) if is_export(Path(path)) else open_reader(path)


def _load_export(reader: ExportReader, verify: bool, left: re.Pattern[str]) -> Backbone:
    if verify:
        reader.verify_files()
    model = _model_of(reader.config, reader.numel, reader.folder)
    empty = model.state_dict()
    reader.require_only(empty)
    for name, values in empty.items():
        require_kind_of_number(name, reader.describe(name)[1], values, reader.folder)
        reader.require_shape(name, tuple(values.shape))
    tensors = {
        name: values if left.fullmatch(name) else reader.tensor(name, tuple(values.shape)).to(values.dtype)
        for name, values in empty.items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _model_of(config: RunConfig, n_weights: int, folder: Path) -> Backbone:
    try:
        return empty_model(config, n_weights)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {str(folder)!r}: {error}") from None


def empty_model(config: RunConfig, n_weights: int) -> Backbone:
    """The model of a checkpoint's config. It occupies no memory, whatever a damaged config asks for.

    Args:
        n_weights: numbers that the checkpoint holds.

    Raises:
        CheckpointError: the config describes no model, or one of more experts than there are numbers.
    """
    model, moe = config.model, config.moe
    experts = len(moe.layer_indices(model.n_layers)) * moe.n_experts
    if experts > n_weights:
        raise CheckpointError(f"{CONFIG}: moe.n_experts = {moe.n_experts}: more than the weights it holds")
    try:
        with torch.device("meta"):
            return model_of(config)
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from None
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{CONFIG}: describes no model ({str(error)[:80]!r})") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the text that the model of `path` was trained on; see `load_model`.

    Raises:
        CheckpointError: there is no complete checkpoint, or its tokenizer is damaged.
    """
    reader = open_model(path)
    try:
        return Tokenizer.from_dict(reader.state.tokenizer)
    except DataError as error:
        raise CheckpointError(f"checkpoint {str(reader.folder)!r}: {error}") from None
