"""Functions: samples of equal length with binary labels, as many of one label as of the other.

Shapes: W samples, S tokens of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.analyze.settings import Settings
from megamoe.analyze.texts import LabelledTexts
from megamoe.data.tokenizers import UNKNOWN, Tokenizer
from megamoe.errors import DataError
from megamoe.moe.randomness import hash_of

FEWEST_SAMPLES = 20
"""Of each class; with fewer, the best of many neurons of noise is near 1."""
MOST_UNKNOWN = 0.25
"""Share of a text's words that may be unknown to the vocabulary."""


@dataclass(frozen=True)
class Function:
    """One question about a sample, with the answers.

    Attributes:
        name: "language/de" asks whether the language is German.
        rows: which samples of the group are asked about.
        labels: the answers, of which half are yes.
    """

    name: str
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SampleGroup:
    """Samples of several classes, on which a model is run once for all functions.

    Attributes:
        name: of the group.
        classes: in the order of their numbers.
        tokens_WS: equally many samples of each class, those of the first class first.
    """

    name: str
    classes: tuple[str, ...]
    tokens_WS: npt.NDArray[np.int64]

    @property
    def functions(self) -> list[Function]:
        """For each class: is it this one, or one of the others, which are drawn evenly?

        With two classes both questions are the same, and one is asked.
        """
        n = len(self.tokens_WS) // len(self.classes)
        rows_CW = np.arange(len(self.tokens_WS)).reshape(len(self.classes), n)
        labels = np.arange(2 * n) < n
        asked = range(1 if len(self.classes) == 2 else len(self.classes))
        found = []
        for c in asked:
            others = np.delete(rows_CW, c, axis=0).T.reshape(-1)[:n]
            found.append(Function(f"{self.name}/{self.classes[c]}", np.append(rows_CW[c], others), labels))
        return found


def sample_groups(
    wanted: Sequence[LabelledTexts], tokenizer: Tokenizer, settings: Settings
) -> tuple[list[SampleGroup], dict[str, str]]:
    """What can be asked in this vocabulary, and of the rest why not.

    Raises:
        DataError: nothing can be asked, or not what the user's own texts are to ask, or two groups have one
            name.
    """
    names = [texts.name for texts in wanted]
    if len(set(names)) < len(names):
        raise DataError(
            f"functions: two groups of {', '.join(names)} have one name; rename a file of --labels"
        )
    groups, skipped = [], {}
    for texts in wanted:
        try:
            groups.append(sample_group(texts, tokenizer, settings))
        except DataError as error:
            if texts.is_own:
                raise
            skipped[texts.name] = str(error)
    if not groups:
        raise DataError(f"functions: none can be asked in {tokenizer.label}: {'; '.join(skipped.values())}")
    return groups, skipped


def sample_group(texts: LabelledTexts, tokenizer: Tokenizer, settings: Settings) -> SampleGroup:
    """Samples of `settings.window` tokens; texts of a class, in a drawn order, are joined where one is short.

    Raises:
        DataError: a class has fewer than `FEWEST_SAMPLES`.
    """
    by_class = {}
    for name, of_class in texts.texts.items():
        rng = np.random.default_rng(hash_of(settings.seed, "samples", texts.name, name))
        windows = list(_windows([of_class[i] for i in rng.permutation(len(of_class))], tokenizer, settings))
        if len(windows) < FEWEST_SAMPLES:
            raise DataError(
                f"{texts.name}: the texts of class {name!r} make {len(windows)} samples of {settings.window}"
                f" {tokenizer.unit}s of this vocabulary; {FEWEST_SAMPLES} are needed"
            )
        by_class[name] = windows
    n = min(len(windows) for windows in by_class.values())
    tokens_WS = np.stack([window for windows in by_class.values() for window in windows[:n]])
    return SampleGroup(texts.name, tuple(by_class), tokens_WS.astype(np.int64))


def _windows(
    texts: Sequence[str | bytes], tokenizer: Tokenizer, settings: Settings
) -> Iterator[npt.NDArray[np.int64]]:
    """Up to `settings.samples` windows; each begins with a text."""
    pieces: list[npt.NDArray[np.int64]] = []
    found = 0
    for text in texts:
        pieces += _encode(text, tokenizer)
        if sum(map(len, pieces)) >= settings.window:
            yield np.concatenate(pieces)[: settings.window]
            pieces, found = [], found + 1
        if found == settings.samples:
            return


def _encode(text: str | bytes, tokenizer: Tokenizer) -> list[npt.NDArray[np.int64]]:
    """The tokens of a line, or none if it cannot be told in this vocabulary."""
    line = (text.encode() if isinstance(text, str) else text) + b"\n"
    try:
        ids = tokenizer.encode(line)
        unknown = tokenizer.encode(UNKNOWN)[0] if tokenizer.unit == "word" else -1
    except DataError:
        return []
    return [] if (ids == unknown).mean() > MOST_UNKNOWN else [ids.astype(np.int64)]
