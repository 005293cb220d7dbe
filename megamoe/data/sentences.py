"""Labelled sentences as tokens, and the batches they make.

Shapes: B sentences, S tokens of the longest sentence of a batch.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megamoe.config.schema import TaskConfig
from megamoe.data.labelled import Example, LabelledText
from megamoe.data.overlap import Fingerprints, Overlap, fingerprints, overlap
from megamoe.data.tokenizers import UNKNOWN, Ids, ReferenceSymbolTokenizer, Tokenizer, WordTokenizer
from megamoe.errors import DataError

START, END = "<CLS>", "<S>"
HELD_OUT = ("valid", "test")


@dataclass(frozen=True)
class Sentences:
    """The sentences of one split.

    Attributes:
        ids: tokens of each.
        labels: class of each, int64.
        n_cut: how many were longer than the model reads and lost their beginning.
    """

    ids: Sequence[Ids]
    labels: npt.NDArray[np.int64]
    n_cut: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SentenceSet:
    """Labelled sentences of one task in the units of one tokenizer.

    Attributes:
        name: honest name of figures measured on it.
        labels: classes in the order of their numbers.
        is_sample: True if figures do not compare with published ones.
        note: what the name cannot say.
        tokenizer: text to ids.
        splits: train, valid and test.
        trained_on: fingerprints of the training sentences.
        overlaps: what valid and test share with them.
    """

    name: str
    labels: tuple[str, ...]
    is_sample: bool
    note: str
    tokenizer: Tokenizer
    splits: Mapping[str, Sentences]
    trained_on: Fingerprints
    overlaps: Mapping[str, Overlap]

    unit = "sentence"
    metric = "accuracy"
    loss_metric = "loss"

    @property
    def vocab_size(self) -> int:
        """Number of ids V."""
        return self.tokenizer.vocab_size

    def require_unseen(self, split: str, max_overlap: float) -> None:
        """Refuse to score a split of which more than a share of `max_overlap` was trained on.

        Raises:
            DataError: naming the split and how many of its sentences were.
        """
        self.overlaps[split].require_below(max_overlap, split, self.name)


def word_tokenizer(text: LabelledText) -> WordTokenizer:
    """The published vocabulary: lower-cased words of all splits by frequency, and one for all others."""
    blocks = (
        "".join(f"{_as_words(e.text)}\n" for e in examples).encode() for examples in text.splits.values()
    )
    words = WordTokenizer.from_counts(WordTokenizer.count(blocks)).words
    return WordTokenizer(words if UNKNOWN in words else [*words, UNKNOWN])


def tokenize(
    text: LabelledText,
    task: TaskConfig,
    tokenizer: Tokenizer,
    max_len: int,
    trained_on: Fingerprints | None = None,
) -> SentenceSet:
    """Labelled text as tokens, its splits compared with what is trained on.

    Args:
        text: the sentences.
        task: says in which units they are read.
        tokenizer: that of the checkpoint, or `word_tokenizer`'s; a sentence ends as its lines do.
        max_len: tokens read of a sentence, the last ones.
        trained_on: what a classifier was trained on before; None: the training sentences of `text`.

    Raises:
        DataError: the tokenizer has no id for something.
    """
    if trained_on is None:
        trained_on = fingerprints(e.text for e in text.splits["train"])
    overlaps = {split: overlap((e.text for e in text.splits[split]), trained_on) for split in HELD_OUT}
    return SentenceSet(
        text.name, text.labels, text.is_sample, text.note, tokenizer,
        {
            split: _encode(examples, text.labels, task, tokenizer, max_len)
            for split, examples in text.splits.items()
        },
        trained_on,
        overlaps,
    )  # fmt: skip


def _as_words(text: str) -> str:
    return f"{START} {text.lower()} {END}"


def _as_line(text: str, tokenizer: Tokenizer) -> bytes:
    """A line of `text`; what the symbols of a tokenizer cannot spell is in small letters, else a space."""
    if not isinstance(tokenizer, ReferenceSymbolTokenizer):
        return f"{text}\n".encode()
    known = set(tokenizer.symbols.tolist())
    if not known.intersection(string.ascii_uppercase.encode()):
        text = text.lower()
    spelt = bytes(byte if byte in known else ord(" ") for byte in text.encode())
    return b" ".join(spelt.split()) + b"\n"


def _encode(
    examples: Sequence[Example], labels: tuple[str, ...], task: TaskConfig, tokenizer: Tokenizer, max_len: int
) -> Sentences:
    numbers = {label: number for number, label in enumerate(labels)}
    ids, n_cut = [], 0
    for example in examples:
        words = task.tokens == "words"
        try:
            tokens = tokenizer.encode(_as_words(example.text) if words else _as_line(example.text, tokenizer))
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from None
        if not len(tokens):
            raise DataError(f"{example.where}: holds nothing that the tokenizer of the checkpoint knows")
        n_cut += len(tokens) > max_len
        ids.append(tokens[-max_len:])
    return Sentences(ids, np.array([numbers[example.label] for example in examples], np.int64), n_cut)


class SentenceBatch(NamedTuple):
    """Some sentences, padded on the left to the longest of the global batch.

    Attributes:
        input_ids_BS: int64; 0 where there is padding.
        padding_BS: True there.
        labels_B: int64.
        starts_epoch: True if memory must be dropped before.
        n_tokens: tokens of the global batch, padding not counted.
    """

    input_ids_BS: torch.Tensor
    padding_BS: torch.Tensor
    labels_B: torch.Tensor
    starts_epoch: bool
    n_tokens: int


def make_batch(
    sentences: Sentences, indices: npt.NDArray[np.int64], rows: Sequence[int], *, starts_epoch: bool
) -> SentenceBatch:
    """Rows of the batch of sentences number `indices`. Its length does not depend on the rows."""
    lengths = [len(sentences.ids[i]) for i in indices]
    length = max(lengths)
    input_ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    padding_BS = torch.ones(len(rows), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids = sentences.ids[indices[row]]
        input_ids_BS[place, length - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
        padding_BS[place, length - len(ids) :] = False
    labels_B = torch.from_numpy(sentences.labels[indices[list(rows)]])
    return SentenceBatch(input_ids_BS, padding_BS, labels_B, starts_epoch, sum(lengths))


class SentenceStream:
    """Shuffled batches of sentences, over and over. A batch is a function of its step alone.

    Sentences are shuffled by (seed, epoch); those that fill no batch at the end of an epoch wait for another.

    Args:
        sentences: what to train on.
        batch_size: sentences over all ranks.
        rows: the contiguous rows of this rank.
        seed: the run's seed.
        bucket: batches whose sentences are sorted by length together, before the batches are shuffled.

    Raises:
        DataError: there are fewer sentences than make a batch.
    """

    def __init__(
        self, sentences: Sentences, *, batch_size: int, rows: range, seed: int, bucket: int = 1
    ) -> None:
        self._sentences, self._batch_size, self._rows = sentences, batch_size, rows
        self._seed, self._bucket = seed, bucket
        self.batches_per_epoch = len(sentences) // batch_size
        if not self.batches_per_epoch:
            raise DataError(
                f"training.batch_size = {batch_size}: there are {len(sentences)} sentences to train on"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros((0, 0), np.int64))

    def batch(self, step: int) -> SentenceBatch:
        """The rows of this rank at `step` (0-based)."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffle(epoch))
        indices = self._order[1][place]
        return make_batch(self._sentences, indices, self._rows, starts_epoch=place == 0)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices of the sentences of each batch, [batches, B]."""
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._sentences))[: self.batches_per_epoch * self._batch_size]
        if self._bucket > 1:
            lengths = np.array([len(ids) for ids in self._sentences.ids])
            size = self._bucket * self._batch_size
            windows = [order[i : i + size] for i in range(0, len(order), size)]
            order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
            return generator.permutation(order.reshape(-1, self._batch_size))
        return order.reshape(-1, self._batch_size)
