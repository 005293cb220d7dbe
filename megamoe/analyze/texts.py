"""Texts by class, from which functions are made: bundled ones, or a file of one's own."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.config.schema import TaskConfig
from megamoe.data.labelled import load_labelled
from megamoe.data.samples import ENWIK8_HEAD, read_sample
from megamoe.errors import DataError

LANGUAGES = ("en", "de", "fr", "es", "ru")
"""Languages of Wikipedia links in enwik8, in two scripts; each sentence is in the set in all of them."""

_MARKUP = re.compile(rb"[\[\]{}<>|=&;*#/'\":]")
_DIGIT = re.compile(rb"[0-9]")
_SHORTEST_LINE = 8


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of two or more classes.

    Attributes:
        name: of the group of functions that they make.
        texts: those of each class.
        is_own: they are the user's, who wants to hear if they cannot be used.
    """

    name: str
    texts: Mapping[str, Sequence[str | bytes]]
    is_own: bool = False


def languages() -> LabelledTexts:
    """The same sentences in several languages."""
    lines = read_sample("pud-parallel.tsv").decode().rstrip("\n").split("\n")
    header, *rows = (line.split("\t") for line in lines)
    columns = {language: header.index(language) for language in LANGUAGES}
    return LabelledTexts(
        "language", {language: [row[column] for row in rows] for language, column in columns.items()}
    )


def polarity() -> LabelledTexts:
    """Film reviews that praise and such that do not, none of which `megamoe finetune` trains on."""
    splits = load_labelled(TaskConfig(name="sst2")).splits
    examples = [*splits["valid"], *splits["test"]]
    return LabelledTexts(
        "polarity",
        {name: [one.text for one in examples if one.label == label] for label, name in
         (("1", "positive"), ("0", "negative"))},
    )  # fmt: skip


def wikitext() -> LabelledTexts:
    """Lines of Wikipedia's source that are markup, numbers or prose: the last tenth of enwik8's sample.

    The presets do not train on that part.
    """
    content = read_sample(ENWIK8_HEAD)
    texts: dict[str, list[str | bytes]] = {"markup": [], "numbers": [], "prose": []}
    for line in content[len(content) * 90 // 100 :].split(b"\n"):
        kind = kind_of_line(line)
        if kind is not None:
            texts[kind].append(line)
    return LabelledTexts("wikitext", texts)


def kind_of_line(line: bytes) -> str | None:
    """ "numbers" above an eighth of digits, else "markup" above an eighth of its characters; "prose" has
    no digits and next to no markup; None of what is mixed or short."""
    if len(line) < _SHORTEST_LINE:
        return None
    digits, marks = (len(pattern.findall(line)) / len(line) for pattern in (_DIGIT, _MARKUP))
    if digits > 1 / 8:
        return "numbers"
    if marks > 1 / 8:
        return "markup"
    return "prose" if not digits and marks < 0.03 else None


BUNDLED: dict[str, Callable[[], LabelledTexts]] = {
    "language": languages,
    "polarity": polarity,
    "wikitext": wikitext,
}


def read_own(path: Path) -> LabelledTexts:
    """Texts of a file with a class, a tab and a text on each line; the group is named after the file.

    Raises:
        DataError: the file cannot be read, a line has another form, or there is one class only.
    """
    try:
        lines = path.read_bytes().decode().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--labels = {str(path)!r}: cannot be read as UTF-8 ({error})") from None
    texts: dict[str, list[str | bytes]] = {}
    for number, line in enumerate(lines, 1):
        label, tab, text = line.partition("\t")
        if not (label.strip() and tab and text.strip()):
            raise DataError(f"{str(path)!r}, line {number}: is not a class, a tab and a text")
        texts.setdefault(label.strip(), []).append(text)
    if len(texts) < 2:
        raise DataError(f"--labels = {str(path)!r}: holds {len(texts)} classes; give texts of two or more")
    return LabelledTexts(path.stem, texts, is_own=True)
