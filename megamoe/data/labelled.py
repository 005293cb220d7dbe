"""Labelled sentences as the published sets come: SST-2, SST-5, IMDB and BANKING77, read line by line.

Every form becomes examples of training, validation and test, which are kept apart: weights are selected on
validation and scored on test. Where a set has no labelled test file, its dev file is the test, and where no
file is left for validation, a fixed share of the training sentences is, chosen by their text alone.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megamoe.config.schema import TaskConfig
from megamoe.data.overlap import fingerprint
from megamoe.data.samples import read_sample
from megamoe.errors import DataError

SPLITS = ("train", "valid", "test")
_STEMS = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
_END_OF_LINE = re.compile(r"\r\n|\r|\n")
_TREE = re.compile(r"\((\d) .+\)")
_LEAF = re.compile(r"\(\d ([^()]+)\)")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")"}
_BREAK = re.compile(r"<br ?/?>")


class Example(NamedTuple):
    """A sentence and its class, as the file names it; `where` is the file and the line."""

    text: str
    label: str
    where: str


@dataclass(frozen=True)
class LabelledText:
    """A set of labelled sentences.

    Attributes:
        name: honest name of figures measured on it.
        labels: classes in the order of their numbers.
        splits: the examples of train, valid and test.
        is_sample: True if figures do not compare with published ones.
        note: how the splits came about.
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, Sequence[Example]]
    is_sample: bool
    note: str


@dataclass(frozen=True)
class _Form:
    """How one task's files look.

    Attributes:
        title: its name for people.
        labels: its classes; empty if the training file names them.
        text: names that the column of sentences may have.
        label: names that the column of classes may have.
        spellings: other names of classes.
        where: where to get it.
    """

    title: str
    labels: tuple[str, ...]
    text: tuple[str, ...]
    label: tuple[str, ...]
    where: str
    spellings: Mapping[str, str] = field(default_factory=dict)


FORMS = {
    "sst2": _Form(
        "SST-2", ("0", "1"), ("sentence",), ("label",),
        "give the folder with train.tsv and dev.tsv of https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
    ),
    "sst5": _Form(
        "SST-5", ("0", "1", "2", "3", "4"), ("sentence", "text"), ("label",),
        "give the folder with train.txt, dev.txt and test.txt of"
        " https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip",
    ),
    "imdb": _Form(
        "IMDB", ("neg", "pos"), ("review", "text"), ("sentiment", "label"),
        "give the folder aclImdb of https://ai.stanford.edu/~amaas/data/sentiment/",
        {"negative": "neg", "positive": "pos", "0": "neg", "1": "pos"},
    ),
    "banking77": _Form(
        "BANKING77", (), ("text",), ("category",),
        "give the folder with train.csv and test.csv of https://github.com/PolyAI-LDN/task-specific-datasets",
    ),
}  # fmt: skip


def load_labelled(task: TaskConfig) -> LabelledText:
    """The labelled sentences of a task, from its folder or bundled.

    Raises:
        DataError: files are missing, or a line is malformed; it names the file and the line.
    """
    form = FORMS[task.name]
    if task.path:
        title, files = f"{form.title} form in {Path(task.path).name}", _read_folder(Path(task.path), form)
        is_sample, origin = True, ""
    elif task.name == "sst2":
        title, files = "sentence polarity v1.0", _read_bundled(form)
        is_sample, origin = True, "bundled; SST-2 was made from these sentences, but it is not SST-2. "
    else:
        raise DataError(f"task.path: no text of {task.name} is bundled; {form.where}")
    labels = task.labels or form.labels or tuple(sorted({example.label for example in files["train"]}))
    _check_labels(files, labels)
    splits, note = _keep_apart(files, task.valid_fraction)
    return LabelledText(title, labels, splits, is_sample, origin + note)


def _read_bundled(form: _Form) -> dict[str, list[Example]]:
    return {
        split: list(_table(f"sentence-polarity.{split}.tsv", text, _tabs, form))
        for split in _STEMS
        for text in [read_sample(f"sentence-polarity.{split}.tsv").decode()]
    }


def _read_folder(folder: Path, form: _Form) -> dict[str, list[Example]]:
    """Examples by "train", "dev" and "test"; a split without labelled file is left out."""
    if not folder.is_dir():
        raise DataError(f"task.path = {str(folder)!r}: is no folder; {form.where}")
    found = {}
    for split, stems in _STEMS.items():
        examples = next((read for stem in stems if (read := _read_split(folder, stem, form))), None)
        if examples:
            found[split] = examples
    if "train" not in found or len(found) == 1:
        missing = "training file" if "train" not in found else "labelled dev or test file"
        raise DataError(
            f"task.path = {str(folder)!r}: has no {missing} in the form of {form.title}; {form.where}"
        )
    return found


def _read_split(folder: Path, stem: str, form: _Form) -> list[Example]:
    """The examples of ``stem.tsv``, ``.csv``, ``.txt`` or ``stem/CLASS/*.txt``; none if there is none."""
    readers: dict[str, Callable[[str, str], Iterator[Example]]] = {
        ".tsv": lambda name, text: _table(name, text, _tabs, form),
        ".csv": lambda name, text: _table(name, text, _commas, form),
        ".txt": _trees,
    }
    for ending, reader in readers.items():
        path = folder / f"{stem}{ending}"
        if path.is_file():
            return list(reader(str(path), _read(path)))
    if (folder / stem).is_dir():
        return [
            _example(_read(path), label, str(path))
            for label in form.labels
            for path in sorted((folder / stem / label).glob("*.txt"))
        ]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r}: cannot be read as UTF-8 ({error})") from None


def _tabs(name: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines cut at tabs. A quote is a character like any other, so it merges no lines."""
    for number, line in enumerate(_END_OF_LINE.split(text), 1):
        if line:
            yield number, line.split("\t")


def _commas(name: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of comma-separated values, in which a quoted field may hold line ends."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{name}, line {rows.line_num}: {error}") from None


def _table(
    name: str, text: str, split: Callable[[str, str], Iterator[tuple[int, list[str]]]], form: _Form
) -> Iterator[Example]:
    """Examples of a table with a header; none if it has sentences but no classes, as GLUE's test files."""
    rows = split(name, text)
    _, header = next(rows, (1, []))
    sentence = next((header.index(column) for column in form.text if column in header), None)
    label = next((header.index(column) for column in form.label if column in header), None)
    if sentence is None:
        raise DataError(
            f"{name}, line 1: expected a header with {' or '.join(form.text)}, found {header!r:.80}"
        )
    if label is None:
        return
    for number, fields in rows:
        where = f"{name}, line {number}"
        if len(fields) != len(header):
            raise DataError(f"{where}: has {len(fields)} fields instead of {len(header)}")
        value = fields[label].strip()
        yield _example(fields[sentence], form.spellings.get(value, value), where)


def _trees(name: str, text: str) -> Iterator[Example]:
    """Sentences of the Stanford Sentiment Treebank: the class of the root, the words of the leaves."""
    for number, line in enumerate(_END_OF_LINE.split(text), 1):
        if line.strip():
            where = f"{name}, line {number}"
            root = _TREE.fullmatch(line.strip())
            if root is None or line.count("(") != line.count(")"):
                raise DataError(f"{where}: is no tree such as (3 (2 Good) (2 film))")
            words = (_BRACKETS.get(word, word) for word in _LEAF.findall(line))
            yield _example(" ".join(words), root[1], where)


def _example(text: str, label: str, where: str) -> Example:
    text = _clean(text)
    if not text:
        raise DataError(f"{where}: the sentence is empty")
    return Example(text, label, where)


def _clean(text: str) -> str:
    """One line without markup of line ends."""
    return " ".join(_BREAK.sub(" ", text).split())


def _check_labels(files: Mapping[str, Sequence[Example]], labels: tuple[str, ...]) -> None:
    for examples in files.values():
        for example in examples:
            if example.label not in labels:
                raise DataError(
                    f"{example.where}: label {example.label!r:.40} is not one of {', '.join(labels)[:80]}"
                )


def _keep_apart(
    files: Mapping[str, Sequence[Example]], valid_fraction: float
) -> tuple[dict[str, Sequence[Example]], str]:
    """Train, valid and test, and how they came about."""
    if len(files) == 3:
        return {"train": files["train"], "valid": files["dev"], "test": files["test"]}, ""
    name, test = ("test", files["test"]) if "test" in files else ("dev", files["dev"])
    limit = int(valid_fraction * 2**64)
    parts: dict[bool, list[Example]] = {False: [], True: []}
    for example in files["train"]:
        parts[fingerprint(example.text) < limit].append(example)
    note = f"the {name} file is the test, {valid_fraction:.0%} of the training sentences select the weights"
    if not parts[True] or not parts[False]:
        raise DataError(
            f"task.valid_fraction = {valid_fraction}: leaves no sentence to train on or to select by;"
            f" there are {len(files['train'])}"
        )
    return {"train": parts[False], "valid": parts[True], "test": test}, note
