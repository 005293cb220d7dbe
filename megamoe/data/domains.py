"""Which domain (language, source, genre) a text is of, place by place.

A file of domains is JSON, with spans of each split by the token at which they start:

    {"format": "megamoe domains 1",
     "train": [[0, 1], [81234, 2], [90000, 1]], "valid": [[0, 1]], "test": [[0, 2]]}

A span is ``[start, domain]`` or ``[start, source, target]`` and reaches to the next one; the first starts at
0. Domains count from 1; 0 means unknown. Positions are those of tokens, bytes for a corpus of bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.data.tokenizers import Ids
from megamoe.errors import DataError

FORMAT = "megamoe domains 1"


@dataclass(frozen=True)
class Domains:
    """Domains of one split.

    Attributes:
        starts_N: token at which each span starts, rising from 0.
        pairs_N2: source and target domain of each span; equal where one was given.
    """

    starts_N: np.ndarray
    pairs_N2: np.ndarray

    def at(self, positions_B: np.ndarray) -> np.ndarray:
        """Source and target domain [B, 2] of the tokens at `positions_B`."""
        pairs_B2: np.ndarray = self.pairs_N2[np.searchsorted(self.starts_N, positions_B, side="right") - 1]
        return pairs_B2

    @property
    def largest(self) -> int:
        """The largest id."""
        return int(self.pairs_N2.max())


def read_domains(path: Path, tokens: Mapping[str, Ids]) -> dict[str, Domains]:
    """The domains of every split of a corpus.

    Raises:
        DataError: the file cannot be read, or is not one of domains of this corpus.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.domains = {str(path)!r}: cannot be read ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"data.domains = {str(path)!r}: its format is not {FORMAT!r}")
    return {split: _of_split(path, split, values.get(split), len(ids)) for split, ids in tokens.items()}


def _of_split(path: Path, split: str, spans: Any, n_tokens: int) -> Domains:
    def refuse(what: str) -> DataError:
        return DataError(f"data.domains = {str(path)!r}: {split}: {what}")

    if not isinstance(spans, list) or not spans:
        raise refuse("has no spans; give [start, domain] of each, the first at 0")
    for place, span in enumerate(spans):
        if not (isinstance(span, list) and len(span) in (2, 3) and all(type(value) is int for value in span)):
            raise refuse(
                f"span {place} is {json.dumps(span)[:60]}; give [start, domain] or [start, source, target]"
            )
        if min(span) < 0:
            raise refuse(f"span {place} is {span}; give numbers of 0 or more")
    starts_N = np.array([span[0] for span in spans], dtype=np.int64)
    if starts_N[0] != 0 or (np.diff(starts_N) <= 0).any():
        raise refuse("starts do not rise from 0")
    if starts_N[-1] >= n_tokens:
        raise refuse(f"a span starts at {starts_N[-1]:,}, beyond the {n_tokens:,} tokens of the corpus")
    return Domains(starts_N, np.array([(span[1], span[-1]) for span in spans], dtype=np.int64))
