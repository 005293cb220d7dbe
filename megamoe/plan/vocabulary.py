"""How many symbols a run will know, and how often, without reading its text."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from megamoe.config.schema import ModelConfig, RunConfig
from megamoe.data.datasets import choose_tokenizer
from megamoe.data.prepared import read_manifest
from megamoe.errors import ConfigError
from megamoe.models.embeddings import vocabulary_clusters

BYTES = 256
WORDS = {"wikitext2": 33_278, "wikitext103": 267_735}

COMMON_WORDS, RARE_EXPONENT = 5000, 1.6
"""Where Zipf's law bends, and how steeply it falls from there."""


def with_known_vocabulary(run: RunConfig) -> RunConfig:
    """`run` with `model.vocab_size` from itself, its prepared data, or what is known of its corpus.

    Raises:
        ConfigError: none of these says.
        DataError: the folder of prepared data is none.
    """
    if run.model.vocab_size:
        return run
    if run.data.path:
        size = read_manifest(Path(run.data.path)).vocab_size
    else:
        unit = choose_tokenizer(run.data.dataset, run.data.tokenizer)
        size = BYTES if unit == "bytes" else WORDS.get(run.data.dataset, 0) if unit == "words" else 0
    if not size:
        raise ConfigError(
            f"model.vocab_size = 0: not known for {run.data.dataset} as {run.data.tokenizer}; give it, or"
            " data.path"
        )
    return replace(run, model=replace(run.model, vocab_size=size))


def cluster_shares(model: ModelConfig) -> list[float]:
    """The share of tokens in each cluster of the vocabulary; 1 without cut-offs.

    By Zipf's law for symbols sorted by frequency: the r-th is 1 / r as frequent as the first, and from the
    5000th on (r / 5000)^-1.6 / 5000. For WikiText-2 this gives the share of the first 1,000, 5,000 or 20,000
    words to within 0.04.
    """
    clusters = vocabulary_clusters(model)
    below = [_cumulated(cluster.stop) for cluster in clusters]
    parts = [after - before for before, after in zip([0.0, *below], below, strict=False)]
    return [part / below[-1] for part in parts]


@cache
def _cumulated(n_symbols: int) -> float:
    """Sum of the law over the first `n_symbols`."""
    common = sum(1 / rank for rank in range(1, min(n_symbols, COMMON_WORDS) + 1))
    if n_symbols <= COMMON_WORDS:
        return common
    slope = RARE_EXPONENT - 1
    return common + (1 - (n_symbols / COMMON_WORDS) ** -slope) / slope
