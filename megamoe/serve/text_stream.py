"""From tokens to text while they come: every piece is of whole characters."""

import codecs

from megamoe.data.tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text that tokens add to a prompt; bytes that make no character become U+FFFD.

    Where the vocabulary is of bytes, or falls back to them, characters may take several tokens. Such tokens
    give no text until the last of them has come.

    Args:
        tokenizer: that of the tokens.
        last_id: the prompt's last token, on which it may depend how the first new one begins.
    """

    def __init__(self, tokenizer: Tokenizer, last_id: int) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._said, self._held = [last_id], list[int]()

    def push(self, token_id: int, final: bool = False) -> str:
        """What can be said of the text after one more token; all that is left if it is the final one."""
        self._held.append(token_id)
        before = self._tokenizer.decode(self._said)
        text = self._tokenizer.decode([*self._said, *self._held])
        if isinstance(text, bytes):
            piece = self._bytes.decode(text[len(before) :], final)
        else:
            piece = text[len(before) :]
            if piece.endswith(REPLACEMENT) and not final:
                return ""
        self._said, self._held = self._held, []
        return piece
