"""A text before and while it becomes tokens: its splits, its vocabulary, its honest name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megamoe.data.sources import Fingerprint, Source, cut, whole_lines
from megamoe.data.tokenizers import (
    ByteTokenizer,
    Ids,
    ReferenceSymbolTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    to_text,
)

SPLITS = ("train", "valid", "test")
SUBWORDS = 8192
# Enough for any vocabulary of subwords; the whole of WikiText-103 would only take longer.
SENTENCEPIECE_TRAINING_BYTES = 64 << 20

Track = Callable[[str, int, Iterator[bytes]], Iterator[bytes]]


def untracked(purpose: str, n_bytes: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks as they are, without showing progress."""
    return blocks


@dataclass(frozen=True)
class RawText:
    """A corpus before it is cut into tokens.

    Attributes:
        dataset: its name in `data.dataset`.
        title: what it is, for people; a sample never carries the name of the whole alone.
        splits: the sources of train, valid and test.
        is_sample: True if a figure measured on it does not compare with published ones.
        note: a sentence on what the title cannot say.
        origin: what the splits were cut from.
        track: wraps every pass over the bytes, to show progress: ``track(purpose, n_bytes, blocks)``.
    """

    dataset: str
    title: str
    splits: Mapping[str, tuple[Source, ...]]
    is_sample: bool = False
    note: str = ""
    origin: tuple[Fingerprint, ...] = ()
    track: Track = field(default=untracked, repr=False)

    def n_bytes(self, split: str) -> int:
        """Length of a split."""
        return sum(source.n_bytes for source in self.splits[split])

    def blocks(self, split: str, purpose: str = "read", *, by_lines: bool = False) -> Iterator[bytes]:
        """One pass over the bytes of a split; in whole lines, the last line of each source included."""
        return self.track(f"{purpose} {split}", self.n_bytes(split), self._blocks(split, by_lines))

    def _blocks(self, split: str, by_lines: bool) -> Iterator[bytes]:
        for source in self.splits[split]:
            yield from whole_lines(source.blocks()) if by_lines else source.blocks()

    def lines(self, split: str, purpose: str) -> Iterator[str]:
        """One pass over the lines of a split, without their ends.

        Raises:
            DataError: the text is not UTF-8.
        """
        for block in self.blocks(split, purpose, by_lines=True):
            yield from to_text(block).split("\n")[:-1]


def split_at(sources: Sequence[Source], valid: int, test: int) -> dict[str, tuple[Source, ...]]:
    """Train, valid and test of the sources laid end to end; `valid` and `test` are where these two begin."""
    bounds = (0, valid, test, sum(source.n_bytes for source in sources))
    return {split: cut(sources, *bound) for split, bound in zip(SPLITS, pairwise(bounds), strict=True)}


def train_tokenizer(kind: str, text: RawText, vocab_size: int = SUBWORDS) -> Tokenizer:
    """A tokenizer of `kind`, with the vocabulary of `text` where it needs one.

    Words and subwords are learned from the training split alone. The reference symbols come from all
    three, as published; they are bytes, so that gives nothing of the held-out text away.

    Args:
        kind: a key of `megamoe.data.tokenizers.TOKENIZERS`.
        text: the corpus.
        vocab_size: number of subwords; the other kinds take what the text holds.
    """
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind == ReferenceSymbolTokenizer.kind:
        return ReferenceSymbolTokenizer.train(
            block for split in SPLITS for block in text.blocks(split, "count symbols of")
        )
    if kind == WordTokenizer.kind:
        return WordTokenizer.train(text.blocks("train", "count words of", by_lines=True))
    stride = -(-text.n_bytes("train") // SENTENCEPIECE_TRAINING_BYTES)
    lines = text.lines("train", "learn subwords of")
    return SentencePieceTokenizer.train((line for i, line in enumerate(lines) if i % stride == 0), vocab_size)


def encode(text: RawText, split: str, tokenizer: Tokenizer) -> Iterator[Ids]:
    """The ids of a split, block after block."""
    for block in text.blocks(split, "encode", by_lines=tokenizer.by_lines):
        yield tokenizer.encode(block)


def count_words(text: RawText, split: str) -> int:
    """Words between white space plus one per line end, which is what word perplexity is per."""
    return sum(len(line.split()) + 1 for line in text.lines(split, "count words of"))


def words_per_token(
    text: RawText, tokenizer: Tokenizer, n_tokens: Mapping[str, int]
) -> dict[str, float] | None:
    """Words per subword in the held-out splits, the normaliser of word perplexity; None for other units."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    return {split: count_words(text, split) / n_tokens[split] for split in ("valid", "test")}


def figure_names(text: RawText, tokenizer: Tokenizer) -> dict[str, Any]:
    """How figures measured on `text` are named: the fields `name`, `unit`, `is_sample` and `note`."""
    characters = text.dataset == "text8" and isinstance(tokenizer, ByteTokenizer)
    return {
        "name": f"{text.title} ({'characters' if characters else tokenizer.label})",
        "unit": "character" if characters else tokenizer.unit,
        "is_sample": text.is_sample,
        "note": text.note,
    }
