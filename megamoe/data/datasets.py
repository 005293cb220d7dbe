"""The published corpora: what their files must be, where to get them, how they are split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamoe.data.encoding import SPLITS, RawText, Track, count_words, split_at, untracked
from megamoe.data.ranks import ALONE, Ranks
from megamoe.data.sources import (
    Fingerprint,
    Source,
    file_source,
    fingerprint,
    next_line_start,
    zip_sources,
)
from megamoe.errors import ConfigError, DataError

# The first is what data.tokenizer = auto means.
TOKENIZER_CHOICES: dict[str, tuple[str, ...]] = {
    "enwik8": ("bytes", "reference_symbols"),
    "text8": ("bytes", "reference_symbols"),
    "wikitext2": ("words", "sentencepiece", "bytes"),
    "wikitext103": ("words", "sentencepiece", "bytes"),
    "text": ("bytes", "sentencepiece", "words"),
}


@dataclass(frozen=True)
class Dataset:
    """What is known for certain about a published corpus.

    Attributes:
        name: its name in `data.dataset`.
        title: its name for people.
        files: its files, by the names they have inside the archive: one, or one for each split.
        where: where to get it.
        n_bytes: length of the one file; 0 if not known.
        md5: hash of the one file; empty if not known.
        held_out: bytes of the one file that are valid, and as many that are test, at its end.
        n_words: words of each split, line ends included; empty if not known.
    """

    name: str
    title: str
    files: tuple[str, ...]
    where: str
    n_bytes: int = 0
    md5: str = ""
    held_out: int = 0
    n_words: Mapping[str, int] = field(default_factory=dict)


_WIKITEXT_FILES = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")


def _wikitext(name: str, title: str, version: str, n_train_words: int) -> Dataset:
    return Dataset(
        name,
        title,
        _WIKITEXT_FILES,
        f"download https://wikitext.smerity.com/{version}.zip, or save {version} of Salesforce/wikitext on"
        " the Hugging Face hub as docs/data.md shows",
        n_words={"train": n_train_words, "valid": 217_646, "test": 245_569},
    )


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "enwik8",
            "enwik8",
            ("enwik8",),
            "download http://mattmahoney.net/dc/enwik8.zip",
            n_bytes=100_000_000,
            md5="a1fa5ffddb56f4953e226637dabbb36a",
            held_out=5_000_000,
        ),
        Dataset(
            "text8",
            "text8",
            ("text8",),
            "download http://mattmahoney.net/dc/text8.zip",
            n_bytes=100_000_000,
            md5="3bea1919949baf155f99411df5fada7e",
            held_out=5_000_000,
        ),
        _wikitext("wikitext2", "WikiText-2", "wikitext-2-v1", 2_088_628),
        _wikitext("wikitext103", "WikiText-103", "wikitext-103-v1", 103_227_021),
    )
}


def choose_tokenizer(dataset: str, requested: str, option: str = "data.tokenizer") -> str:
    """The tokenizer that `requested` means for `dataset`; "auto" means its usual one.

    Raises:
        ConfigError: that corpus is not read in those units.
    """
    choices = TOKENIZER_CHOICES[dataset]
    if requested == "auto":
        return choices[0]
    if requested not in choices:
        raise ConfigError(f"{option} = {requested!r}: {dataset} is read as {', '.join(choices)}")
    return requested


def open_dataset(
    dataset: Dataset, paths: Sequence[Path], track: Track = untracked, ranks: Ranks = ALONE
) -> RawText:
    """A published corpus from its archive, its raw files or a folder with them, checked and split.

    Raises:
        DataError: files are missing, or are not the published ones.
    """
    sources = _locate(dataset, paths)
    if len(sources) == 1:
        _check_size(dataset, sources[0])
    origin = _fingerprints(sources, track, ranks)
    if len(sources) == 1:
        _check_hash(dataset, origin[0])
        n_bytes = sources[0].n_bytes
        splits = split_at(sources, n_bytes - 2 * dataset.held_out, n_bytes - dataset.held_out)
    else:
        splits = {split: (source,) for split, source in zip(SPLITS, sources, strict=True)}
    text = RawText(dataset.name, dataset.title, splits, origin=origin, track=track, ranks=ranks)
    for split, expected in dataset.n_words.items():
        found = count_words(text, split)
        if found != expected:
            raise DataError(
                f"{dataset.name}: {split} has {found:,} words and line ends instead of {expected:,}, so it is"
                f" not the original; {dataset.where}"
            )
    return text


def open_text(
    files: Sequence[Path],
    title: str,
    *,
    valid: Sequence[Path] = (),
    test: Sequence[Path] = (),
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    by_lines: bool,
    track: Track = untracked,
    ranks: Ranks = ALONE,
) -> RawText:
    """Any files as a corpus.

    Args:
        files: the training text, or all of it where no `valid` and `test` are given.
        title: name of the corpus in figures.
        valid: files of the validation split; go together with `test`.
        test: files of the test split.
        fractions: shares of train, valid and test, in this order of the files laid end to end.
        by_lines: move cuts to the next start of a line, so that no word is torn.
        track: shows progress.
        ranks: who reads them, each its share.

    Raises:
        ConfigError: only one of `valid` and `test` is given, or the fractions are none.
        DataError: a file cannot be read.
    """
    if bool(valid) != bool(test):
        raise ConfigError("valid and test: give files for both, or for neither to split by fractions")
    groups = [[file_source(path) for path in group] for group in (files, valid, test)]
    origin = _fingerprints([source for group in groups for source in group], track, ranks)
    if valid:
        splits = {split: tuple(group) for split, group in zip(SPLITS, groups, strict=True)}
    else:
        splits = _split_by_fractions(groups[0], fractions, by_lines)
    return RawText("text", title, splits, origin=origin, track=track, ranks=ranks)


def _split_by_fractions(
    sources: Sequence[Source], fractions: tuple[float, float, float], by_lines: bool
) -> dict[str, tuple[Source, ...]]:
    if not (min(fractions) > 0 and abs(sum(fractions) - 1) < 1e-6):
        raise ConfigError(f"splits = {fractions}: give three shares above 0 that sum to 1")
    total = sum(source.n_bytes for source in sources)
    cuts = [int(total * fractions[0]), int(total * (fractions[0] + fractions[1]))]
    if by_lines:
        cuts = [next_line_start(sources, offset) for offset in cuts]
    return split_at(sources, *cuts)


def _locate(dataset: Dataset, paths: Sequence[Path]) -> list[Source]:
    """The sources of `dataset.files`, in that order, from archives, folders and files."""
    if not paths:
        raise DataError(f"{dataset.name}: no file was given; {dataset.where}")
    found: dict[str, Source] = {}
    for path in paths:
        if path.is_dir():
            found |= {name: file_source(path / name) for name in dataset.files if (path / name).is_file()}
        elif path.suffix == ".zip":
            found |= zip_sources(path)
        else:
            # A file that is the whole corpus may have any name; its content is checked.
            name = dataset.files[0] if len(dataset.files) == 1 else path.name
            found[name] = file_source(path)
    missing = [name for name in dataset.files if name not in found]
    if missing:
        where = ", ".join(map(str, paths))
        raise DataError(f"{dataset.name}: {', '.join(missing)} not found in {where}; {dataset.where}")
    return [found[name] for name in dataset.files]


def _fingerprints(sources: Sequence[Source], track: Track, ranks: Ranks) -> tuple[Fingerprint, ...]:
    """Those of all sources; the ranks take turns, since a hash cannot be divided."""
    mine = [
        fingerprint(source.name, track(f"check {source.name}", source.n_bytes, source.blocks()))
        for source in sources[ranks.rank :: ranks.size]
    ]
    return ranks.combine(
        mine, lambda by_rank: tuple(by_rank[i % ranks.size][i // ranks.size] for i in range(len(sources)))
    )


def _check_size(dataset: Dataset, source: Source) -> None:
    if dataset.n_bytes and source.n_bytes != dataset.n_bytes:
        raise DataError(
            f"{source.name}: has {source.n_bytes:,} bytes instead of {dataset.n_bytes:,}, so it is not"
            f" {dataset.title}; {dataset.where}"
        )


def _check_hash(dataset: Dataset, found: Fingerprint) -> None:
    if dataset.md5 and found.md5 != dataset.md5:
        raise DataError(
            f"{found.name}: has md5 {found.md5} instead of {dataset.md5}, so it is not {dataset.title};"
            f" {dataset.where}"
        )
