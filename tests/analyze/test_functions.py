"""Samples with labels, from bundled and own texts, in every kind of vocabulary."""

import numpy as np
import pytest

from megamoe.analyze.functions import sample_group, sample_groups
from megamoe.analyze.settings import Settings
from megamoe.analyze.texts import BUNDLED, LANGUAGES, LabelledTexts, kind_of_line, read_own
from megamoe.data.tokenizers import (
    ByteTokenizer,
    ReferenceSymbolTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
)
from megamoe.errors import ConfigError, DataError

SETTINGS = Settings(window=32, samples=25)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_functions_of_bytes(name):
    group = sample_group(BUNDLED[name](), ByteTokenizer(), SETTINGS)
    assert group.tokens_WS.shape == (25 * len(group.classes), 32)
    for function in group.functions:
        assert function.labels.sum() == 25 == len(function.labels) / 2
        assert len(np.unique(function.rows)) == 50
        own = group.classes.index(function.name.partition("/")[2])
        assert (function.rows[function.labels] // 25 == own).all()
        others = np.bincount(function.rows[~function.labels] // 25, minlength=len(group.classes))
        assert others[own] == 0
        assert np.ptp(np.delete(others, own)) <= 1
    assert len(group.functions) == (1 if name == "polarity" else len(group.classes))


def test_samples_begin_with_texts_and_are_drawn_by_the_seed():
    texts = LabelledTexts("t", {c: [f"{c}{i:02}" for i in range(90)] for c in "ab"})
    tokenizer, settings = ByteTokenizer(), Settings(window=10, samples=22)
    group = sample_group(texts, tokenizer, settings)
    assert {bytes(row.tolist())[3:4] for row in group.tokens_WS} == {b"\n"}
    assert {row[0] for row in group.tokens_WS[:22]} == {ord("a")}
    again, other = (sample_group(texts, tokenizer, Settings(window=10, samples=22, seed=s)) for s in (0, 1))
    assert (group.tokens_WS == again.tokens_WS).all()
    assert (group.tokens_WS != other.tokens_WS).any()


def test_languages_tell_the_same():
    texts = BUNDLED["language"]().texts
    assert list(texts) == list(LANGUAGES)
    assert {len(sentences) for sentences in texts.values()} == {1000}
    assert texts["de"][1].startswith("Für alle")


def test_words_that_the_vocabulary_lacks():
    words = WordTokenizer(["<eos>", "<unk>", "the", "film", "is", "not", "good", "bad", "and", "it"])
    common = [f"the film is {word} and it is not {word} x" for word in ["good", "bad"] * 30]
    texts = LabelledTexts("t", {"known": common, "strange": ["unheard words alone stand here"] * 60})
    with pytest.raises(DataError, match="class 'strange' make 0 samples of 8 words"):
        sample_group(texts, words, Settings(window=8))
    groups, skipped = sample_groups(
        [texts, BUNDLED["polarity"](), replace_name(common)], words, Settings(window=8)
    )
    assert [group.name for group in groups] == ["both"]
    assert list(skipped) == ["t", "polarity"]


def replace_name(common):
    return LabelledTexts("both", {"a": common, "b": common})


def test_symbols_that_the_vocabulary_lacks():
    letters = ReferenceSymbolTokenizer([*b" abcdefghijklmnopqrstuvwxyz"])
    with pytest.raises(
        DataError, match="functions: none can be asked in reference symbols: language: the texts"
    ):
        sample_groups([BUNDLED["language"]()], letters, SETTINGS)


def test_subwords():
    sentences = BUNDLED["language"]().texts
    subwords = SentencePieceTokenizer.train(iter([*sentences["en"], *sentences["de"]]), 400)
    group = sample_group(LabelledTexts("t", {c: sentences[c] for c in ("en", "de")}), subwords, SETTINGS)
    assert group.tokens_WS.max() < 400


def test_kinds_of_lines():
    assert kind_of_line(b"      <timestamp>2005-08-07T04:53:53Z</timestamp>") == "numbers"
    assert kind_of_line(b"&lt;!-- [[Image:x]] |}") == "markup"
    assert kind_of_line(b"Theists claim that a single deity or group of deities exists.") == "prose"
    assert kind_of_line(b"In 1969 [[Neil Armstrong]] walked on the moon, as all of the world knows") is None
    assert kind_of_line(b"short") is None


def test_texts_of_ones_own(tmp_path):
    path = tmp_path / "topics.tsv"
    path.write_text("sport\tThe ball is round.\nfood\tSoup is\thot.\nsport\tRun!\n")
    own = read_own(path)
    assert (own.name, own.texts) == (
        "topics",
        {"sport": ["The ball is round.", "Run!"], "food": ["Soup is\thot."]},
    )
    with pytest.raises(DataError, match="topics: the texts of class 'sport' make 0 samples of 32 bytes"):
        sample_groups([BUNDLED["polarity"](), own], ByteTokenizer(), SETTINGS)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no tab here\n", "line 1: is not a class, a tab and a text"),
        (b"a\tfine\n\tno class\n", "line 2: is not"),
        (b"a\tfine\nb\t \n", "line 2: is not"),
        (b"a\tone\na\ttwo\n", "holds 1 classes"),
        (b"\xff\xfe\n", "cannot be read as UTF-8"),
        (b"", "line 1: is not"),
    ],
)
def test_own_texts_that_are_none(tmp_path, content, problem):
    path = tmp_path / "own.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_own(path)


@pytest.mark.parametrize(
    "values",
    [
        {"window": 1},
        {"samples": 0},
        {"top_share": 1.0},
        {"alpha": 0.0},
        {"k": 0},
        {"draws": -1},
        {"shuffles": 0},
    ],
)
def test_settings_out_of_range(values):
    with pytest.raises(ConfigError, match=f"analysis.{next(iter(values))} = "):
        Settings(**values)
