"""Text to token ids and back: bytes, the published symbols, words, and SentencePiece subwords."""

import base64
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import sentencepiece

from megamoe.errors import DataError

Ids = npt.NDArray[Any]

NEWLINE = ord("\n")
END_OF_LINE = "<eos>"
END_OF_LINE_ID = 0
UNKNOWN = "<unk>"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds every id below `vocab_size`."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.int32)


class Tokenizer(ABC):
    """Turns text into ids from 0 to `vocab_size` - 1 and back.

    Class attributes:
        kind: its name in `data.tokenizer`.
        unit: what one token is: byte, symbol, word or subword.
        by_lines: True if text must be encoded in whole lines; False if it may be cut anywhere.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    by_lines: ClassVar[bool]

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)

    @property
    @abstractmethod
    def label(self) -> str:
        """What a figure measured in these tokens is called, as in ``enwik8 (true bytes)``."""

    @abstractmethod
    def encode(self, text: str | bytes) -> Ids:
        """Ids of `text` as a 1-D array; str is taken as UTF-8.

        Raises:
            DataError: the text holds something this tokenizer has no id for.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str | bytes:
        """The text of `ids`: bytes where one token is a byte, else str."""

    @abstractmethod
    def _values(self) -> dict[str, Any]:
        """What `_from_values` needs, in plain values for JSON."""

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "Tokenizer":
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Tokenizer.from_dict` reads them back."""
        return {"kind": self.kind, **self._values()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_dict` described.

        Raises:
            DataError: the description is of no known kind, or incomplete.
        """
        values = dict(values) if isinstance(values, Mapping) else {}
        kind = values.pop("kind", None)
        if not isinstance(kind, str) or kind not in TOKENIZERS:
            raise DataError(f"tokenizer kind = {kind!r}: unknown, choose from {', '.join(TOKENIZERS)}")
        try:
            return TOKENIZERS[kind]._from_values(values)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise DataError(f"tokenizer {kind!r}: description is damaged ({error!r})") from None


class ByteTokenizer(Tokenizer):
    """One token per byte, the id is the byte: nothing is lost, nothing is unknown."""

    kind = "bytes"
    unit = "byte"
    by_lines = False
    label = "true bytes"

    def __init__(self) -> None:
        super().__init__(256)

    def encode(self, text: str | bytes) -> Ids:
        """The bytes of `text`."""
        return np.frombuffer(_to_bytes(text), np.uint8)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The ids as bytes."""
        return np.fromiter(ids, np.uint8).tobytes()

    def _values(self) -> dict[str, Any]:
        return {}


class ReferenceSymbolTokenizer(Tokenizer):
    """Bytes as the published enwik8 loader has them: newlines are dropped, ids follow frequency.

    Args:
        symbols: byte values in the order of their ids.
    """

    kind = "reference_symbols"
    unit = "symbol"
    by_lines = False
    label = "reference symbols"

    def __init__(self, symbols: Sequence[int]) -> None:
        super().__init__(len(symbols))
        self.symbols = np.array(symbols, np.uint8)
        self._id_of = np.full(256, -1)
        self._id_of[self.symbols] = np.arange(len(symbols))

    @staticmethod
    def count(blocks: Iterable[bytes]) -> Counter[int]:
        """How often each byte is in `blocks`, in order of first appearance."""
        counts: Counter[int] = Counter()
        for block in blocks:
            counts.update(block)
        return counts

    @classmethod
    def from_counts(cls, counts: Counter[int]) -> "ReferenceSymbolTokenizer":
        """Symbols by falling frequency; ties in the order of `counts`."""
        return cls([symbol for symbol, _ in counts.most_common() if symbol != NEWLINE])

    def encode(self, text: str | bytes) -> Ids:
        """Ids of all bytes but newlines.

        Raises:
            DataError: a byte is not among the symbols.
        """
        symbols = np.frombuffer(_to_bytes(text), np.uint8)
        symbols = symbols[symbols != NEWLINE]
        ids = self._id_of[symbols]
        if (ids < 0).any():
            unknown = symbols[ids < 0][0]
            raise DataError(f"byte {unknown}: is not among the {self.vocab_size} symbols of this corpus")
        return ids.astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; newlines are lost."""
        return self.symbols[np.fromiter(ids, np.int64)].tobytes()

    def _values(self) -> dict[str, Any]:
        return {"symbols": self.symbols.tolist()}


class WordTokenizer(Tokenizer):
    """Words between white space, as the published WikiText loader has them; every line end is ``<eos>``.

    Args:
        words: words in the order of their ids; the first is ``<eos>``. A word that is missing here
            becomes ``<unk>`` if that is one of them.
    """

    kind = "words"
    unit = "word"
    by_lines = True
    label = "words"

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(len(words))
        if not words or words[0] != END_OF_LINE:
            raise DataError(f"word list: its first entry must be {END_OF_LINE}")
        self.words = list(words)
        self._id_of = _WordIds({word: i for i, word in enumerate(words)})

    @staticmethod
    def count(blocks: Iterable[bytes]) -> Counter[str]:
        """How often each word is in `blocks` of whole lines, in order of first appearance."""
        counts: Counter[str] = Counter()
        for block in blocks:
            counts.update(to_text(block).split())
        return counts

    @classmethod
    def from_counts(cls, counts: Counter[str]) -> "WordTokenizer":
        """``<eos>``, then words by falling frequency; ties in the order of `counts`."""
        return cls([END_OF_LINE, *(word for word, _ in counts.most_common() if word != END_OF_LINE)])

    def encode(self, text: str | bytes) -> Ids:
        """Ids of the words, and one for each line end.

        Raises:
            DataError: a word is unknown and there is no ``<unk>``, or the text is not UTF-8.
        """
        ids: list[int] = []
        *lines, rest = _universal_newlines(to_text(text)).split("\n")
        for line in lines:
            ids.extend(map(self._id_of.__getitem__, line.split()))
            ids.append(END_OF_LINE_ID)
        ids.extend(map(self._id_of.__getitem__, rest.split()))
        return np.array(ids, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Words between single spaces, with a line end for each ``<eos>``."""
        lines = _split(ids, END_OF_LINE_ID)
        return "\n".join(" ".join(self.words[i] for i in line) for line in lines)

    def _values(self) -> dict[str, Any]:
        return {"words": self.words}


class _WordIds(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if UNKNOWN in self:
            return self[UNKNOWN]
        raise DataError(
            f"word {word!r}: is not in the training text, which has no {UNKNOWN} either;"
            " choose the tokenizer sentencepiece or bytes"
        )


class SentencePieceTokenizer(Tokenizer):
    """Subwords of a SentencePiece unigram model that falls back to bytes; every line end is ``</s>``.

    Args:
        model: the serialized SentencePiece model.
    """

    kind = "sentencepiece"
    unit = "subword"
    by_lines = True

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        super().__init__(self._processor.vocab_size())

    @property
    def label(self) -> str:
        """Names the size of the vocabulary too: subword figures of different ones do not compare."""
        return f"{self.vocab_size} subwords"

    @classmethod
    def train(cls, lines: Iterator[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Learn `vocab_size` subwords from `lines`; the same lines give the same model, bit for bit.

        Raises:
            DataError: the text does not fit that number of subwords.
        """
        model = io.BytesIO()
        # The trainer leaves out lines of more than 4192 bytes, so long ones come in pieces.
        pieces = (line[i : i + 1000] for line in lines for i in range(0, len(line), 1000))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=pieces,
                model_writer=model,
                vocab_size=vocab_size,
                byte_fallback=True,
                # Together these make decode(encode(line)) the line itself.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,  # several would add counts in varying order
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2] or "no text to learn from"
            raise DataError(f"vocab_size = {vocab_size}: does not fit the text. {reason}") from None
        return cls(model.getvalue())

    def encode(self, text: str | bytes) -> Ids:
        """Ids of the subwords, and one for each line end.

        Raises:
            DataError: the text is not UTF-8.
        """
        *lines, rest = self._processor.encode(to_text(text).split("\n"))
        end = self._processor.eos_id()
        return np.array([i for line in lines for i in (*line, end)] + rest, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text itself; U+2581, which SentencePiece uses as its space, comes back as a space."""
        return "\n".join(self._processor.decode(list(_split(ids, self._processor.eos_id()))))

    def _values(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self.model).decode("ascii")}

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "SentencePieceTokenizer":
        return cls(base64.b64decode(values["model"], validate=True))


TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, ReferenceSymbolTokenizer, WordTokenizer, SentencePieceTokenizer)
}


def _to_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def to_text(text: str | bytes) -> str:
    """`text` as str.

    Raises:
        DataError: the bytes are not UTF-8.
    """
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8 ({error}): choose the tokenizer bytes") from None


def _universal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split(ids: Iterable[int], separator: int) -> Iterator[list[int]]:
    """`ids` cut at each `separator`, which is left out; one more piece than there are separators."""
    piece: list[int] = []
    for i in ids:
        if i == separator:
            yield piece
            piece = []
        else:
            piece.append(int(i))
    yield piece
