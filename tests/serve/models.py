"""Checkpoints of small language models that can go on with texts."""

from pathlib import Path
from typing import Any

import torch

from megamoe.data.tokenizers import ReferenceSymbolTokenizer, Tokenizer
from tests.checkpoint.runs import VOCAB_SIZE
from tests.checkpoint.small import model_of, write_model

EVALUATED = 4
SYMBOLS = b"abcdefghijklmnopqrstuvwxyz .,?!\xc3"
LETTERS = ReferenceSymbolTokenizer(list(SYMBOLS))
assert LETTERS.vocab_size == VOCAB_SIZE


def write_language_model(folder: Path, tokenizer: Tokenizer = LETTERS, **updates: Any) -> Path:
    """A random model whose predictions are far from even, evaluated in segments of `EVALUATED`."""
    config, model = model_of(**{"evaluation": {"segment_len": EVALUATED}} | updates)
    draws = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draws), alpha=0.3)
    return write_model(folder, config, model, tokenizer=tokenizer.to_dict())
