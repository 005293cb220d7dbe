"""The vocabulary of a published run as a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

from megamoe.data.tokenizers import ReferenceSymbolTokenizer, Tokenizer, WordTokenizer
from megamoe.errors import CheckpointError


def read_symbols(path: Path) -> list[str]:
    """Symbols in the order of their ids: a JSON list of text, or lines of one symbol each.

    Raises:
        CheckpointError: the file cannot be read, or is another kind of JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        symbols = json.loads(text) if path.suffix == ".json" else text.split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"--vocab {str(path)!r}: cannot be read ({error})") from None
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        raise CheckpointError(f"--vocab {str(path)!r}: is no list of text")
    return symbols[:-1] if path.suffix != ".json" and symbols[-1] == "" else symbols


def tokenizer_of(symbols: Sequence[str], vocab_size: int) -> Tokenizer:
    """The tokenizer with these symbols: of bytes if all are decimal byte values, else of words.

    Raises:
        CheckpointError: they are not as many as the model has, or come twice.
        DataError: words whose first is not ``<eos>``.
    """
    if len(symbols) != vocab_size or len(set(symbols)) != vocab_size:
        raise CheckpointError(
            f"--vocab: {len(set(symbols))} different symbols, but the model has {vocab_size}"
        )
    if all(symbol.isascii() and symbol.isdigit() and int(symbol) < 256 for symbol in symbols):
        return ReferenceSymbolTokenizer([int(symbol) for symbol in symbols])
    return WordTokenizer(symbols)
