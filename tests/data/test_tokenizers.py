import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.data.sources import bytes_source, whole_lines
from megamoe.data.tokenizers import (
    ByteTokenizer,
    ReferenceSymbolTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    token_dtype,
)
from megamoe.errors import DataError
from tests.data import goldens

SENTENCES = [f"The router sends token {i} to expert {i * 7 % 13} of {i % 5} ." for i in range(200)]


@pytest.fixture(scope="module")
def subwords() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(iter(SENTENCES), 300)


def every_kind(subwords: SentencePieceTokenizer) -> Iterator[Tokenizer]:
    yield ByteTokenizer()
    yield ReferenceSymbolTokenizer(list(b"abc "))
    yield WordTokenizer(["<eos>", "a", "b", "<unk>"])
    yield subwords


def test_reference_symbols_are_those_of_the_published_loader() -> None:
    arrays, corpus = goldens.read("enwik8")
    raw = goldens.content("enwik8", "raw.bin")
    tokenizer = ReferenceSymbolTokenizer.from_counts(ReferenceSymbolTokenizer.count([raw]))
    assert [str(symbol) for symbol in tokenizer.symbols] == corpus["vocab"]
    for split, part in (("train", raw[:3072]), ("valid", raw[3072:3584]), ("test", raw[3584:])):
        np.testing.assert_array_equal(tokenizer.encode(part), arrays[f"{split}_ids"])


def test_words_are_those_of_the_published_loader() -> None:
    arrays, corpus = goldens.read("wt103")
    tokenizer = WordTokenizer.from_counts(WordTokenizer.count([goldens.content("wt103", "train.txt")]))
    assert tokenizer.words == corpus["vocab"]
    for split in ("train", "valid", "test"):
        ids = tokenizer.encode(goldens.content("wt103", f"{split}.txt"))
        np.testing.assert_array_equal(ids, arrays[f"{split}_ids"])


@given(st.binary())
def test_bytes_round_trip(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary(min_size=1))
def test_symbols_round_trip_without_newlines(text: bytes) -> None:
    tokenizer = ReferenceSymbolTokenizer.from_counts(ReferenceSymbolTokenizer.count([text]))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(b"\n", b"")


@given(st.lists(st.integers(0, 3)))
def test_word_ids_round_trip(ids: list[int]) -> None:
    tokenizer = WordTokenizer(["<eos>", "the", "Router", "<unk>"])
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids


# U+2581 stands for the space inside SentencePiece, lone surrogates are no text.
any_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


@given(text=any_text)
def test_subwords_round_trip_any_text(subwords: SentencePieceTokenizer, text: str) -> None:
    assert subwords.decode(subwords.encode(text)) == text
    assert subwords.encode(text).tolist() == subwords.encode(text.encode()).tolist()


@given(text=st.text("ab \n"), block_bytes=st.integers(1, 7))
def test_text_may_come_in_blocks(subwords: SentencePieceTokenizer, text: str, block_bytes: int) -> None:
    """Blocks of any size, re-cut at line ends where a tokenizer wants that, give the ids of the whole."""
    source = bytes_source("text", text.encode())
    for tokenizer in every_kind(subwords):
        if isinstance(tokenizer, ReferenceSymbolTokenizer | ByteTokenizer):
            whole, blocks = text, source.blocks(block_bytes)
        else:
            whole = text if not text or text.endswith("\n") else text + "\n"
            blocks = whole_lines(source.blocks(block_bytes))
        in_blocks = [i for block in blocks for i in tokenizer.encode(block).tolist()]
        assert in_blocks == tokenizer.encode(whole).tolist()


def test_descriptions_survive_json(subwords: SentencePieceTokenizer) -> None:
    text = "a b\nb a\n"
    for tokenizer in every_kind(subwords):
        again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert type(again) is type(tokenizer)
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"kind": "pickle"},
        {"kind": "words"},
        {"kind": "words", "words": ["the"]},
        {"kind": "reference_symbols", "symbols": [1000]},
        {"kind": "sentencepiece", "model": "AAAA"},
        {"kind": "sentencepiece", "model": "not base64!"},
        {"kind": "bytes", "extra": 1},
    ],
)
def test_damaged_descriptions_are_refused(description: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"tokenizer|word list"):
        Tokenizer.from_dict(description)


def test_unknown_words_become_unk_where_there_is_one() -> None:
    assert WordTokenizer(["<eos>", "<unk>"]).encode("what\n").tolist() == [1, 0]
    with pytest.raises(DataError, match=r"word 'what'.*no <unk>.*sentencepiece or bytes"):
        WordTokenizer(["<eos>", "the"]).encode("what\n")


def test_word_order_is_by_frequency_then_appearance_with_case_kept() -> None:
    tokenizer = WordTokenizer.from_counts(WordTokenizer.count([b"b a The a\n", b"\nthe <eos> b a\n"]))
    assert tokenizer.words == ["<eos>", "a", "b", "The", "the"]


def test_every_line_end_is_a_token_whatever_its_form() -> None:
    tokenizer = WordTokenizer(["<eos>", "a"])
    assert tokenizer.encode(b"a\r\na\ra\n\n a").tolist() == [1, 0, 1, 0, 1, 0, 0, 1]


def test_a_byte_outside_the_symbols_is_refused() -> None:
    with pytest.raises(DataError, match="byte 122"):
        ReferenceSymbolTokenizer(list(b"ab")).encode("abz")


def test_text_that_is_not_utf8_is_refused(subwords: SentencePieceTokenizer) -> None:
    for tokenizer in (WordTokenizer(["<eos>"]), subwords):
        with pytest.raises(DataError, match=r"not UTF-8.*choose the tokenizer bytes"):
            tokenizer.encode(b"\xff\n")


def test_learning_subwords_is_deterministic(subwords: SentencePieceTokenizer) -> None:
    assert SentencePieceTokenizer.train(iter(SENTENCES), 300).model == subwords.model


def test_very_long_lines_are_learned_from_too() -> None:
    tokenizer = SentencePieceTokenizer.train(iter([" ".join(SENTENCES)]), 300)
    assert len(tokenizer.encode("expert")) < len("expert")


@pytest.mark.parametrize("vocab_size", [0, 5, 100_000])
def test_a_vocabulary_size_that_does_not_fit_is_refused(vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size = {vocab_size}: does not fit"):
        SentencePieceTokenizer.train(iter(SENTENCES), vocab_size)


def test_ids_use_the_smallest_type() -> None:
    sizes = {1: "uint8", 256: "uint8", 257: "uint16", 65_536: "uint16", 65_537: "int32", 267_735: "int32"}
    assert {size: token_dtype(size).name for size in sizes} == sizes
