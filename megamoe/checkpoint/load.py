"""A checkpoint as a model to use: no DeepSpeed, no process group."""

from pathlib import Path

import torch

from megamoe.checkpoint.format import CONFIG
from megamoe.checkpoint.matching import require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.data.tokenizers import Tokenizer
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.placement import saved_buffers


def load_model(path: str | Path) -> TransformerXL:
    """The trained model in evaluation mode, on the CPU in fp32, with all experts.

    Args:
        path: a run folder, whose newest checkpoint is taken; or a ``step-*`` or ``best`` folder.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is not what its config says.
    """
    reader = CheckpointReader(locate(path))
    config = reader.config
    try:
        model = TransformerXL(config.model, config.moe, seed=config.training.seed)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {str(reader.folder)!r}: {CONFIG}: {error}") from None
    require_same_tensors(reader, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor("weight", name))
        for name, buffer in saved_buffers(model).items():
            buffer.copy_(reader.tensor("buffer", name))
    return model.eval()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the text that the model of `path` was trained on; see `load_model`.

    Raises:
        CheckpointError: there is no complete checkpoint, or its tokenizer is damaged.
    """
    reader = CheckpointReader(locate(path))
    try:
        return Tokenizer.from_dict(reader.state.tokenizer)
    except DataError as error:
        raise CheckpointError(f"checkpoint {str(reader.folder)!r}: {error}") from None
