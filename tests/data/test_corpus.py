from pathlib import Path

import numpy as np
import pytest

from megamoe.config.schema import DataConfig
from megamoe.data import Corpus, load_corpus, samples
from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.errors import ConfigError, DataError

# What megamoe/data/samples/README.md says.
ENWIK8_SIZES = {"train": 3_735_000, "valid": 207_500, "test": 207_500}


def sizes(corpus: Corpus) -> dict[str, int]:
    return {split: len(tokens) for split, tokens in corpus.tokens.items()}


def test_the_enwik8_sample_in_true_bytes() -> None:
    corpus = load_corpus(DataConfig())
    assert corpus.name == "enwik8-sample (true bytes)"
    assert (corpus.unit, corpus.metric, corpus.vocab_size, corpus.is_sample) == ("byte", "bpc", 256, True)
    assert "not comparable" in corpus.note
    assert sizes(corpus) == ENWIK8_SIZES
    assert bytes(corpus.tokens["train"][:10]) == b"<mediawiki"
    assert corpus.tokens["train"].dtype == np.uint8
    whole = b"".join(corpus.tokenizer.decode(tokens) for tokens in corpus.tokens.values())
    assert whole == samples.read_sample(samples.ENWIK8_HEAD)


def test_the_enwik8_sample_in_reference_symbols() -> None:
    corpus = load_corpus(DataConfig(tokenizer="reference_symbols"))
    assert corpus.name == "enwik8-sample (reference symbols)"
    assert (corpus.unit, corpus.metric, corpus.vocab_size) == ("symbol", "bpc", 199)
    newlines = samples.read_sample(samples.ENWIK8_HEAD).count(b"\n")
    assert sum(sizes(corpus).values()) == 4_150_000 - newlines
    everything = np.concatenate(list(corpus.tokens.values()))
    assert (np.diff(np.bincount(everything)) <= 0).all()


def test_the_text8_sample_is_named_as_derived() -> None:
    corpus = load_corpus(DataConfig(dataset="text8"))
    assert corpus.name == "text8-style sample derived from enwik8 head (characters)"
    assert (corpus.unit, corpus.metric, corpus.is_sample) == ("character", "bpc", True)
    assert sizes(corpus) == {"train": 2_707_776, "valid": 150_432, "test": 150_433}
    assert set(corpus.tokenizer.decode(corpus.tokens["test"])) == set(b" abcdefghijklmnopqrstuvwxyz")


def test_the_wikitext2_sample_has_the_counts_of_the_original() -> None:
    corpus = load_corpus(DataConfig(dataset="wikitext2"))
    assert corpus.name == "WikiText-2 with train articles in another order (words)"
    assert (corpus.unit, corpus.metric, corpus.is_sample) == ("word", "ppl", True)
    assert corpus.vocab_size == 33_278
    assert sizes(corpus) == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    assert corpus.tokens["train"].dtype == np.uint16
    assert corpus.words_per_token is None


def test_tokens_cannot_be_overwritten() -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_corpus(DataConfig()).tokens["train"][0] = 0


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            DataConfig(dataset="wikitext103"),
            DataError,
            r"data\.dataset = 'wikitext103'.*prepare_data.*wikitext2",
        ),
        (DataConfig(dataset="text"), DataError, r"data\.dataset = 'text'.*give data\.path"),
        (
            DataConfig(tokenizer="words"),
            ConfigError,
            r"data\.tokenizer = 'words': enwik8 is read as bytes, ref",
        ),
        (
            DataConfig(dataset="wikitext2", tokenizer="sentencepiece"),
            ConfigError,
            r"data\.tokenizer = 'sentencepiece'.*wikitext2 --sample.*data\.path=DIR",
        ),
        (DataConfig(path="/nowhere"), DataError, r"data\.path = '/nowhere'.*tools/prepare_data\.py"),
    ],
)
def test_what_cannot_be_loaded_says_why_in_one_line(
    config: DataConfig, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load_corpus(config)
    assert "\n" not in str(caught.value)


def test_a_damaged_installation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samples.SHA256, samples.ENWIK8_HEAD, "0" * 64)
    with pytest.raises(DataError, match="enwik8-head: its content has changed, reinstall"):
        load_corpus(DataConfig())


def test_a_folder_holds_what_the_config_says(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words\n" * 100)
    prepare(open_text([tmp_path / "text"], "mine", by_lines=False), tmp_path / "out", "bytes")
    folder = str(tmp_path / "out")
    assert load_corpus(DataConfig(dataset="text", path=folder)).name == "mine (true bytes)"
    with pytest.raises(DataError, match=r"data\.dataset = 'enwik8': .*out holds text; set data\.dataset"):
        load_corpus(DataConfig(path=folder))
    with pytest.raises(DataError, match=r"data\.tokenizer = 'words': .*out holds bytes; prepare it"):
        load_corpus(DataConfig(dataset="text", path=folder, tokenizer="words"))
