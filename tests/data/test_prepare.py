import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megamoe.config.schema import DataConfig
from megamoe.data import encoding, load_corpus
from megamoe.data.corpus import corpus_in_memory
from megamoe.data.datasets import open_dataset, open_text
from megamoe.data.encoding import RawText
from megamoe.data.prepare import prepare
from megamoe.data.prepared import verify
from megamoe.data.sources import bytes_source
from megamoe.data.tokenizers import SentencePieceTokenizer
from megamoe.errors import DataError
from tests.data import goldens
from tests.data.test_datasets import RAW, SMALL_ENWIK8, SMALL_WIKITEXT, wikitext_files, write_zip

LINES = "".join(f"line {i} of the text , about expert {i % 7}\n" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> RawText:
    (tmp_path / "mine.txt").write_text(LINES)
    return open_text([tmp_path / "mine.txt"], "mine.txt", by_lines=True)


def test_enwik8_from_its_archive_in_true_bytes(tmp_path: Path) -> None:
    raw = open_dataset(SMALL_ENWIK8, [write_zip(tmp_path / "enwik8.zip", {"enwik8": RAW})])
    prepare(raw, tmp_path / "out", "bytes")
    corpus = load_corpus(DataConfig(dataset="enwik8", path=str(tmp_path / "out")))
    assert corpus.name == "enwik8 (true bytes)"
    assert (corpus.is_sample, corpus.unit, corpus.metric, corpus.vocab_size) == (False, "byte", "bpc", 256)
    assert b"".join(tokens.tobytes() for tokens in corpus.tokens.values()) == RAW


@pytest.mark.parametrize(
    ("name", "kind", "figure"),
    [
        ("enwik8", "reference_symbols", "enwik8 (reference symbols)"),
        ("wt103", "words", "WikiText-103 (words)"),
    ],
)
def test_archives_become_the_published_ids(tmp_path: Path, name: str, kind: str, figure: str) -> None:
    dataset, files = {"enwik8": (SMALL_ENWIK8, {"enwik8": RAW}), "wt103": (SMALL_WIKITEXT, wikitext_files())}[
        name
    ]
    raw = open_dataset(dataset, [write_zip(tmp_path / "archive.zip", files)])
    prepare(raw, tmp_path / "out", kind)
    corpus = load_corpus(DataConfig(dataset=dataset.name, path=str(tmp_path / "out")))
    assert corpus.name == figure
    arrays, description = goldens.read(name)
    assert corpus.vocab_size == len(description["vocab"])
    for split, tokens in corpus.tokens.items():
        np.testing.assert_array_equal(tokens, arrays[f"{split}_ids"])


@pytest.mark.parametrize("kind", ["bytes", "words", "sentencepiece"])
def test_a_folder_is_what_the_text_is_in_memory(tmp_path: Path, text: RawText, kind: str) -> None:
    if kind == "words":
        text = RawText("text", "t", dict.fromkeys(("train", "valid", "test"), text.splits["train"]))
    prepare(text, tmp_path / "out", kind, vocab_size=300)
    corpus = load_corpus(DataConfig(dataset="text", path=str(tmp_path / "out")))
    for split, tokens in corpus.tokens.items():
        assert isinstance(tokens, np.memmap)
        assert not tokens.flags.writeable
        original = b"".join(text.blocks(split))
        decoded = corpus.tokenizer.decode(tokens)
        assert decoded == (original if kind == "bytes" else original.decode())
    if kind != "sentencepiece":
        in_memory = corpus_in_memory(text, kind)
        assert (in_memory.name, in_memory.unit) == (corpus.name, corpus.unit)
        for split, tokens in corpus.tokens.items():
            np.testing.assert_array_equal(in_memory.tokens[split], tokens)
            assert in_memory.tokens[split].dtype == tokens.dtype


def test_subwords_carry_the_normaliser_of_word_perplexity(tmp_path: Path, text: RawText) -> None:
    prepare(text, tmp_path / "out", "sentencepiece", vocab_size=300)
    corpus = load_corpus(DataConfig(dataset="text", path=str(tmp_path / "out")))
    assert corpus.name == "mine.txt (300 subwords)"
    assert (corpus.unit, corpus.metric) == ("subword", "ppl")
    assert corpus.words_per_token is not None
    for split in ("valid", "test"):
        content = b"".join(text.blocks(split)).decode()
        words = len(content.split()) + content.count("\n")
        assert corpus.words_per_token[split] == pytest.approx(words / len(corpus.tokens[split]))


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path, text: RawText) -> None:
    for name in ("one", "two"):
        prepare(text, tmp_path / name, "sentencepiece", vocab_size=300)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_manifest_tells_the_origin(tmp_path: Path, text: RawText) -> None:
    prepare(text, tmp_path / "out", "bytes")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["origin"][0]["name"] == "mine.txt"
    assert manifest["origin"][0]["n_bytes"] == len(LINES)
    assert manifest["dtype"] == "uint8"
    assert {split: file["n_tokens"] for split, file in manifest["splits"].items()} == {
        split: text.n_bytes(split) for split in text.splits
    }


@pytest.mark.parametrize("failure", [KeyboardInterrupt, DataError, OSError])
def test_an_interrupted_preparation_leaves_nothing(
    tmp_path: Path, text: RawText, failure: type[BaseException]
) -> None:
    def interrupt(purpose: str, n_bytes: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
        yield from blocks
        if purpose == "encode valid":
            raise failure

    broken = RawText("text", "t", text.splits, track=interrupt)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError if failure is OSError else failure):
        prepare(broken, tmp_path / "out", "bytes")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_use_is_never_overwritten(tmp_path: Path, text: RawText) -> None:
    (tmp_path / "out").mkdir()
    prepare(text, tmp_path / "out", "bytes")
    with pytest.raises(DataError, match=r"output '.*out': exists already; remove it"):
        prepare(text, tmp_path / "out", "bytes")
    verify(tmp_path / "out")
    with pytest.raises(DataError, match=r"output '.*mine.txt': exists already"):
        prepare(text, tmp_path / "mine.txt", "bytes")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("one line\n")
    raw = open_text([tmp_path / "tiny"], "tiny", by_lines=True)
    with pytest.raises(DataError, match="valid: holds no tokens; give it more text"):
        prepare(raw, tmp_path / "out", "words")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("blank_first", [True, False])
def test_subwords_are_learned_from_an_even_share_of_the_text(
    blank_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every other line is blank, every second line would be all of the text or none of it."""
    lines = ["", "x" * 99] if blank_first else ["x" * 99, ""]
    text = RawText("text", "t", {"train": (bytes_source("t", ("\n".join(lines * 1000)).encode()),)})
    monkeypatch.setattr(encoding, "SENTENCEPIECE_TRAINING_BYTES", text.n_bytes("train") // 4)
    taken: list[str] = []
    monkeypatch.setattr(SentencePieceTokenizer, "train", lambda lines, vocab_size: taken.extend(lines))
    encoding._learn_subwords(text, 10)
    assert sum(map(len, taken)) == pytest.approx(text.n_bytes("train") / 4, rel=0.02)


def test_a_small_text_is_learned_whole() -> None:
    lines = ["a", "bb", "ccc"] * 5
    assert list(encoding._evenly(lines, 1.0)) == lines
