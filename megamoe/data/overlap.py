"""Whether sentences that are scored were trained on: hashes of what stays of a text without its spelling."""

import base64
import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.errors import DataError

_BRACKETS = ("-lrb-", "-rrb-")

Fingerprints = npt.NDArray[np.uint64]


def normalized(text: str) -> str:
    """Letters and digits alone, without case and accents: the same for the same sentence in two editions."""
    text = text.lower()
    for word in _BRACKETS:
        text = text.replace(word, "")
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isalnum())


def fingerprint(text: str) -> int:
    """64 bits that texts share if they are equal once normalized."""
    return int.from_bytes(hashlib.sha256(normalized(text).encode()).digest()[:8], "little")


def fingerprints(texts: Iterable[str]) -> Fingerprints:
    """The fingerprints of texts, sorted, each once."""
    return np.unique(np.fromiter(map(fingerprint, texts), np.uint64))


@dataclass(frozen=True)
class Overlap:
    """How many of a split's sentences were trained on.

    Attributes:
        shared: those that training has too.
        total: all of them.
    """

    shared: int
    total: int

    def require_below(self, limit: float, split: str, name: str) -> None:
        """Refuse figures of a split that training has seen.

        Raises:
            DataError: the share is above `limit`.
        """
        if self.shared > limit * self.total:
            raise DataError(
                f"task.max_overlap = {limit:g}: {self.shared} of the {self.total} sentences of the {split}"
                f" split of {name} were trained on, so its accuracy would say nothing; score other ones"
            )


def overlap(texts: Iterable[str], trained_on: Fingerprints) -> Overlap:
    """What `texts` share with the texts behind `trained_on`."""
    found = np.fromiter(map(fingerprint, texts), np.uint64)
    return Overlap(int(np.isin(found, trained_on).sum()), len(found))


def to_text(prints: Fingerprints) -> str:
    """Fingerprints for JSON."""
    return base64.b64encode(prints.astype("<u8").tobytes()).decode("ascii")


def from_text(text: Any) -> Fingerprints:
    """What `to_text` wrote.

    Raises:
        DataError: it did not.
    """
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<u8").astype(np.uint64)
    except (TypeError, ValueError) as error:
        raise DataError(f"fingerprints of the training sentences: are damaged ({error})") from None
