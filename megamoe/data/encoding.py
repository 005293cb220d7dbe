"""A text before and while it becomes tokens: its splits, its vocabulary, its honest name."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from megamoe.data.ranks import ALONE, Ranks
from megamoe.data.sources import Fingerprint, Source, cut, lines_that_begin_in, overlaps, whole_lines
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

Symbol = TypeVar("Symbol")
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
        ranks: who reads it; every pass is over the share of this rank.
    """

    dataset: str
    title: str
    splits: Mapping[str, tuple[Source, ...]]
    is_sample: bool = False
    note: str = ""
    origin: tuple[Fingerprint, ...] = ()
    track: Track = field(default=untracked, repr=False)
    ranks: Ranks = ALONE

    def n_bytes(self, split: str) -> int:
        """Length of a split."""
        return sum(source.n_bytes for source in self.splits[split])

    def blocks(self, split: str, purpose: str = "read", *, by_lines: bool = False) -> Iterator[bytes]:
        """One pass over this rank's bytes of a split, or over its lines.

        Lines come whole, the last one of each source included, and belong to the rank in whose bytes
        they begin.
        """
        start, stop = self.ranks.share(self.n_bytes(split))
        blocks = self._blocks(split, start, stop, by_lines)
        return self.track(self.ranks.label(f"{purpose} {split}"), stop - start, blocks)

    def _blocks(self, split: str, start: int, stop: int, by_lines: bool) -> Iterator[bytes]:
        for source, first, last in overlaps(self.splits[split], start, stop):
            if by_lines:
                yield from whole_lines(lines_that_begin_in(source, first, last))
            else:
                yield from source.part(first, last).blocks()

    def lines(self, split: str, purpose: str) -> Iterator[str]:
        """One pass over this rank's lines of a split, without their ends.

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
        counts = [ReferenceSymbolTokenizer.count(text.blocks(split, "count symbols of")) for split in SPLITS]
        return text.ranks.combine(
            counts,
            lambda by_rank: ReferenceSymbolTokenizer.from_counts(
                _add(part for by_split in zip(*by_rank, strict=True) for part in by_split)
            ),
        )
    if kind == WordTokenizer.kind:
        words = WordTokenizer.count(text.blocks("train", "count words of", by_lines=True))
        return text.ranks.combine(words, lambda by_rank: WordTokenizer.from_counts(_add(by_rank)))
    # Learning subwords does not divide: rank 0 reads the whole text.
    return text.ranks.combine(None, lambda _: _learn_subwords(replace(text, ranks=ALONE), vocab_size))


def _add(parts: Iterable[Counter[Symbol]]) -> Counter[Symbol]:
    """The sum, in the order in which a single count over all parts would have met the symbols."""
    total: Counter[Symbol] = Counter()
    for part in parts:
        total.update(part)
    return total


def _learn_subwords(text: RawText, vocab_size: int) -> SentencePieceTokenizer:
    share = min(1.0, SENTENCEPIECE_TRAINING_BYTES / max(1, text.n_bytes("train")))
    lines = _evenly(text.lines("train", "learn subwords of"), share)
    return SentencePieceTokenizer.train(lines, vocab_size)


def _evenly(lines: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the text in whole lines, spread evenly by length: many lines may be blank."""
    seen = taken = 0
    for line in lines:
        seen += len(line)
        if taken < share * seen:
            taken += len(line)
            yield line


def encode(text: RawText, split: str, tokenizer: Tokenizer) -> Iterator[Ids]:
    """The ids of this rank's share of a split, block after block."""
    for block in text.blocks(split, "encode", by_lines=tokenizer.by_lines):
        yield tokenizer.encode(block)


def count_words(text: RawText, split: str) -> int:
    """Words between white space plus one per line end, which is what word perplexity is per."""
    return text.ranks.combine(sum(len(line.split()) + 1 for line in text.lines(split, "count words of")), sum)


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
