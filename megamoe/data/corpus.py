"""A tokenized corpus, and where a run gets one from: a prepared folder or the bundled text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megamoe.config.schema import DataConfig
from megamoe.data.datasets import choose_tokenizer
from megamoe.data.domains import Domains, read_domains
from megamoe.data.encoding import (
    SPLITS,
    RawText,
    encode,
    figure_names,
    train_tokenizer,
    words_per_token,
)
from megamoe.data.prepared import map_tokens, read_manifest, read_tokenizer
from megamoe.data.samples import bundled_text
from megamoe.data.tokenizers import Ids, Tokenizer
from megamoe.errors import ConfigError, DataError


@dataclass(frozen=True)
class Corpus:
    """Train, valid and test tokens of one text.

    Attributes:
        name: honest name of figures measured on it, such as ``enwik8 (true bytes)``.
        unit: what one token is: byte, symbol, character, word or subword.
        is_sample: True if figures do not compare with published ones.
        note: a sentence on what the name cannot say; may be empty.
        tokens: read-only 1-D ids by split, in memory or memory-mapped: uint8, uint16 or int32.
        tokenizer: text to ids and back.
        words_per_token: for subwords, words per token of the held-out splits: the perplexity per word is
            exp(loss per token / words_per_token). None for other units.
        domains: of each split, where `data.domains` names a file of them.
    """

    name: str
    unit: str
    is_sample: bool
    note: str
    tokens: Mapping[str, Ids]
    tokenizer: Tokenizer
    words_per_token: Mapping[str, float] | None = None
    domains: Mapping[str, Domains] | None = None

    def domains_of(self, split: str) -> Domains | None:
        """Those of one split, if there are any."""
        return self.domains[split] if self.domains is not None else None

    @property
    def vocab_size(self) -> int:
        """Number of ids V."""
        return self.tokenizer.vocab_size

    @property
    def metric(self) -> Literal["bpc", "ppl"]:
        """What the loss is reported as: bits per character, or perplexity for words and subwords."""
        return "ppl" if self.unit in ("word", "subword") else "bpc"

    @property
    def loss_metric(self) -> str:
        """What the loss of training is reported as."""
        return self.metric


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that a run reads.

    Raises:
        ConfigError: the tokenizer does not go with the corpus.
        DataError: files are missing, damaged, or hold another corpus.
    """
    corpus = _from_folder(config) if config.path else _from_sample(config)
    if config.domains:
        corpus = replace(corpus, domains=read_domains(Path(config.domains), corpus.tokens))
    return corpus


def _from_folder(config: DataConfig) -> Corpus:
    folder = Path(config.path)
    manifest = read_manifest(folder)
    if manifest.dataset != config.dataset:
        raise DataError(
            f"data.dataset = {config.dataset!r}: {config.path} holds {manifest.dataset}; set data.dataset to"
            " that, or data.path to another folder"
        )
    if config.tokenizer not in ("auto", manifest.tokenizer):
        raise DataError(
            f"data.tokenizer = {config.tokenizer!r}: {config.path} holds {manifest.tokenizer}; prepare it"
            f" with --tokenizer {config.tokenizer}, or take data.tokenizer=auto"
        )
    return Corpus(
        name=manifest.name,
        unit=manifest.unit,
        is_sample=manifest.is_sample,
        note=manifest.note,
        tokens=map_tokens(folder, manifest),
        tokenizer=read_tokenizer(folder, manifest),
        words_per_token=manifest.words_per_token,
    )


def _from_sample(config: DataConfig) -> Corpus:
    text = bundled_text(config.dataset)
    kind = choose_tokenizer(config.dataset, config.tokenizer)
    if kind == "sentencepiece":
        raise ConfigError(
            "data.tokenizer = 'sentencepiece': needs subwords that were learned before; run"
            f" tools/prepare_data.py {config.dataset} --sample --tokenizer sentencepiece --output DIR"
            " and set data.path=DIR"
        )
    return corpus_in_memory(text, kind)


def corpus_in_memory(text: RawText, tokenizer_kind: str) -> Corpus:
    """`text` tokenized at once; for texts that fit in memory."""
    tokenizer = train_tokenizer(tokenizer_kind, text)
    tokens = {split: np.concatenate(list(encode(text, split, tokenizer))) for split in SPLITS}
    for ids in tokens.values():
        ids.setflags(write=False)
    n_tokens = {split: len(ids) for split, ids in tokens.items()}
    return Corpus(
        tokens=tokens,
        tokenizer=tokenizer,
        words_per_token=words_per_token(text, tokenizer, n_tokens),
        **figure_names(text, tokenizer),
    )
