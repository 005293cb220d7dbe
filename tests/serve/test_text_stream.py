from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megamoe.data.tokenizers import (
    ByteTokenizer,
    ReferenceSymbolTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
)
from megamoe.serve.text_stream import REPLACEMENT, TextStream

SENTENCES = [f"The router sends token {i} to expert {i * 7 % 13} of {i % 5} ." for i in range(200)]
SUBWORDS = SentencePieceTokenizer.train(iter(SENTENCES), 300)
WORDS = WordTokenizer(["<eos>", "a", "house", "<unk>"])


def pieces_of(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt[-1])
    return [stream.push(token_id, final=n == len(ids)) for n, token_id in enumerate(ids, start=1)]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "text"),
    [
        (ByteTokenizer(), "na", "ïve 東京 🙂\n."),
        (ReferenceSymbolTokenizer(range(256)), "na", "ïve 東京 🙂 ."),
        (WORDS, "a house", " a house\na <unk>\n\na"),
        (WORDS, "a\n", "house a"),
        (SUBWORDS, "The router", " sends 東京 token 🙂s\nto  expert\n\n 7 ."),
        (SUBWORDS, "The 京", "🙂京 of\n"),
    ],
)
def test_pieces_of_whole_characters_make_the_text(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    prompt_ids = tokenizer.encode(prompt).tolist()
    ids = tokenizer.encode(prompt + text).tolist()[len(prompt_ids) :]
    pieces = pieces_of(tokenizer, prompt_ids, ids)
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces)
    whole = [piece for piece in pieces if piece]
    assert len(whole) > 1


@given(st.binary(min_size=1, max_size=12))
@example("東".encode()[:2])
@example("東".encode()[:2] + "東".encode())
def test_bytes_that_make_no_character_are_replaced(data: bytes) -> None:
    pieces = pieces_of(ByteTokenizer(), [65], list(data))
    assert "".join(pieces) == data.decode(errors="replace")


@given(st.lists(st.integers(0, SUBWORDS.vocab_size - 1), min_size=1, max_size=8))
def test_any_subwords_are_decoded_as_at_once(ids: list[int]) -> None:
    prompt = SUBWORDS.encode("The router").tolist()
    pieces = pieces_of(SUBWORDS, prompt, ids)
    assert "".join(pieces) == SUBWORDS.decode([*prompt, *ids]).removeprefix("The router")
