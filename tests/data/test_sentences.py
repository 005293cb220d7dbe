"""Sentences as tokens and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.config.schema import TaskConfig
from megamoe.data.labelled import load_labelled
from megamoe.data.sentences import (
    Sentences,
    SentenceSet,
    SentenceStream,
    make_batch,
    tokenize,
    word_tokenizer,
)
from megamoe.data.tokenizers import ByteTokenizer, ReferenceSymbolTokenizer, Tokenizer
from megamoe.errors import DataError
from tests.data import goldens


def published(folder: Path) -> SentenceSet:
    """The recorded set; published code reads train and dev, of which we want a test too."""
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_bytes(goldens.content("sst2", name))
    (folder / "test.tsv").write_text("sentence\tlabel\nthe\t1\n")
    task = TaskConfig(name="sst2", path=str(folder), tokens="words")
    text = load_labelled(task)
    return tokenize(text, task, word_tokenizer(text), max_len=100)


def test_words_are_those_of_the_published_vocabulary(tmp_path: Path) -> None:
    arrays, description = goldens.read("sst2")
    text = published(tmp_path)
    assert text.tokenizer.to_dict()["words"] == [*description["vocab"], "<unk>"]
    for split, recorded in (("train", "train"), ("valid", "dev")):
        ids = text.splits[split].ids
        assert np.concatenate(ids).tolist() == arrays[f"{recorded}_flat"].tolist()
        assert [len(sentence) for sentence in ids] == arrays[f"{recorded}_lengths"].tolist()
        assert text.splits[split].labels.tolist() == arrays[f"{recorded}_labels"].tolist()


def test_batches_are_padded_as_published(tmp_path: Path) -> None:
    arrays, description = goldens.read("sst2")
    size, sentences = description["batch"], published(tmp_path).splits["train"]
    for i in range(description["train_batches"]):
        indices = np.arange(i * size, (i + 1) * size)
        batch = make_batch(sentences, indices, range(size), starts_epoch=False)
        assert batch.input_ids_BS.t().tolist() == arrays[f"train/tokens{i}"].tolist()
        # The diagonal of the published mask hides padding alone.
        padding_BS = torch.from_numpy(arrays[f"train/mask{i}"]).bool().diagonal(dim1=0, dim2=1)
        assert torch.equal(batch.padding_BS, padding_BS)
        assert batch.labels_B.tolist() == arrays[f"train/label{i}"].tolist()
        assert batch.n_tokens == (~padding_BS).sum()


def letters() -> Tokenizer:
    return ReferenceSymbolTokenizer(list(b" abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("tokenizer", "line"),
    [(ByteTokenizer(), "Cliché, 2 times\n".encode()), (letters(), b"clich times")],
    ids=["bytes", "letters"],
)
def test_sentences_in_the_symbols_of_the_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, line: bytes
) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\nCliché, 2 times\t1\nx {name}\t0\n")
    task = TaskConfig(name="sst2", path=str(tmp_path))
    text = tokenize(load_labelled(task), task, tokenizer, max_len=100)
    assert tokenizer.decode(text.splits["train"].ids[0]) == line
    cut = tokenize(load_labelled(task), task, tokenizer, max_len=9).splits["train"]
    assert tokenizer.decode(cut.ids[0]) == line[-9:]
    assert cut.n_cut == 1
    assert text.overlaps["test"].shared == 1
    with pytest.raises(DataError, match=r"^task.max_overlap = 0.1: 1 of the 2 sentences of the test split"):
        text.require_unseen("test", 0.1)


def test_a_sentence_that_cannot_be_spelt_is_named(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n123\t1\n")
    task = TaskConfig(name="sst2", path=str(tmp_path))
    with pytest.raises(DataError, match=r"train.tsv, line 2: holds nothing that the tokenizer"):
        tokenize(load_labelled(task), task, letters(), max_len=9)


def numbered(n: int) -> Sentences:
    """Sentence i has label i and between 1 and 40 tokens."""
    lengths = np.random.default_rng(0).integers(1, 41, n)
    return Sentences([np.full(length, i) for i, length in enumerate(lengths)], np.arange(n), 0)


@pytest.mark.parametrize("bucket", [1, 3])
def test_an_epoch_has_each_sentence_once_and_ranks_share_batches(bucket: int) -> None:
    sentences = numbered(30)
    whole, *shares = (
        SentenceStream(sentences, batch_size=4, rows=rows, seed=3, bucket=bucket)
        for rows in (range(4), range(2), range(2, 4))
    )
    seen = []
    for step in range(2 * whole.batches_per_epoch):
        batch = whole.batch(step)
        assert batch.starts_epoch == (step % 7 == 0)
        for field, parts in zip(
            batch[:3], zip(*(s.batch(step)[:3] for s in shares), strict=True), strict=True
        ):
            assert torch.equal(field, torch.cat(parts))
        seen.append(batch.labels_B.tolist())
    first, second = np.concatenate(seen[:7]).tolist(), np.concatenate(seen[7:]).tolist()
    assert len(set(first)) == len(set(second)) == 28
    assert first != second
    assert whole.batch(2).labels_B.tolist() == seen[2]  # whatever was read before
    other = SentenceStream(sentences, batch_size=4, rows=range(4), seed=4, bucket=bucket)
    assert other.batch(0).labels_B.tolist() != seen[0]


def test_buckets_pad_less() -> None:
    sentences = numbered(400)
    padding = {}
    for bucket in (1, 20):
        stream = SentenceStream(sentences, batch_size=8, rows=range(8), seed=0, bucket=bucket)
        padding[bucket] = sum(int(stream.batch(step).padding_BS.sum()) for step in range(50))
    assert padding[20] < padding[1] / 4


def test_too_few_sentences_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"^training.batch_size = 8: there are 7 sentences to train on$"):
        SentenceStream(numbered(7), batch_size=8, rows=range(8), seed=0)
