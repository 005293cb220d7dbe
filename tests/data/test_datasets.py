import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.data.datasets import DATASETS, Dataset, choose_tokenizer, open_dataset, open_text
from megamoe.data.encoding import RawText
from megamoe.errors import ConfigError, DataError
from tests.data import goldens

RAW = goldens.content("enwik8", "raw.bin")
SMALL_ENWIK8 = replace(DATASETS["enwik8"], n_bytes=len(RAW), md5=hashlib.md5(RAW).hexdigest(), held_out=512)
SMALL_WIKITEXT = replace(DATASETS["wikitext103"], n_words={"train": 95, "valid": 28, "test": 27})


def contents(text: RawText) -> dict[str, bytes]:
    return {split: b"".join(text.blocks(split)) for split in text.splits}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def wikitext_files() -> dict[str, bytes]:
    return {
        f"wiki.{split}.tokens": goldens.content("wt103", f"{split}.txt")
        for split in ("train", "valid", "test")
    }


def test_facts_of_the_published_corpora() -> None:
    for name in ("enwik8", "text8"):
        dataset = DATASETS[name]
        assert dataset.n_bytes == 100_000_000
        assert dataset.held_out == 5_000_000
        assert f"http://mattmahoney.net/dc/{name}.zip" in dataset.where
    assert DATASETS["enwik8"].md5 == "a1fa5ffddb56f4953e226637dabbb36a"


@pytest.mark.parametrize("as_zip", [True, False])
def test_one_file_is_checked_and_split_at_its_end(tmp_path: Path, as_zip: bool) -> None:
    path = tmp_path / ("enwik8.zip" if as_zip else "my-copy")
    if as_zip:
        write_zip(path, {"enwik8": RAW})
    else:
        path.write_bytes(RAW)
    text = open_dataset(SMALL_ENWIK8, [path])
    assert contents(text) == {"train": RAW[:3072], "valid": RAW[3072:3584], "test": RAW[3584:]}
    assert not text.is_sample
    assert [(origin.n_bytes, origin.sha256) for origin in text.origin] == [
        (4096, hashlib.sha256(RAW).hexdigest())
    ]


@pytest.mark.parametrize("form", ["zip", "folder", "files"])
def test_wikitext_comes_as_an_archive_a_folder_or_files(tmp_path: Path, form: str) -> None:
    files = wikitext_files()
    if form == "zip":
        folder = {f"wikitext-103/{name}": content for name, content in files.items()}
        paths = [write_zip(tmp_path / "wikitext-103-v1.zip", folder)]
    else:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        paths = [tmp_path] if form == "folder" else [tmp_path / name for name in files]
    text = open_dataset(SMALL_WIKITEXT, paths)
    assert list(contents(text).values()) == list(files.values())


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes(RAW[:-1])
    with pytest.raises(DataError, match=r"enwik8: has 4,095 bytes instead of 4,096.*download http://matt"):
        open_dataset(SMALL_ENWIK8, [path])
    path.write_bytes(RAW[:-1] + b"!")
    with pytest.raises(DataError, match=r"enwik8: has md5 \w+ instead of \w+, so it is not enwik8; download"):
        open_dataset(SMALL_ENWIK8, [path])


def test_the_real_enwik8_is_asked_for_by_default(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "enwik8.zip", {"enwik8": RAW})
    with pytest.raises(DataError, match=r"enwik8\.zip:enwik8: has 4,096 bytes instead of 100,000,000"):
        open_dataset(DATASETS["enwik8"], [path])


def test_other_words_are_refused(tmp_path: Path) -> None:
    for name, content in wikitext_files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"wikitext103: train has 95 words.*instead of 103,227,021.*smerity"):
        open_dataset(DATASETS["wikitext103"], [tmp_path])


@pytest.mark.parametrize(
    ("dataset", "missing"), [(SMALL_ENWIK8, "enwik8"), (SMALL_WIKITEXT, "wiki.test.tokens")]
)
def test_missing_files_are_named_with_where_to_get_them(
    tmp_path: Path, dataset: Dataset, missing: str
) -> None:
    archive = write_zip(tmp_path / "a.zip", {"wiki.train.tokens": b"", "wiki.valid.tokens": b""})
    with pytest.raises(DataError, match=f"{missing} not found in .*a.zip; download http"):
        open_dataset(dataset, [archive])
    with pytest.raises(DataError, match=f"{dataset.name}: no file was given; download http"):
        open_dataset(dataset, [])


def test_a_text_is_cut_by_fractions(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_bytes(b"0123\n56")
    paths[1].write_bytes(b"78\nabcdefg")
    by_bytes = open_text(paths, "t", fractions=(0.5, 0.25, 0.25), by_lines=False)
    assert contents(by_bytes) == {"train": b"0123\n567", "valid": b"8\nab", "test": b"cdefg"}
    by_lines = open_text(paths, "t", fractions=(0.2, 0.3, 0.5), by_lines=True)
    assert contents(by_lines) == {"train": b"0123\n", "valid": b"5678\n", "test": b"abcdefg"}


def test_a_text_may_bring_its_own_splits(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("train", "valid", "test")]
    for path in paths:
        path.write_text(path.name)
    text = open_text(paths[:1], "t", valid=paths[1:2], test=paths[2:], by_lines=False)
    assert contents(text) == {"train": b"train", "valid": b"valid", "test": b"test"}
    with pytest.raises(ConfigError, match="give files for both"):
        open_text(paths[:1], "t", valid=paths[1:2], by_lines=False)


@pytest.mark.parametrize(
    "fractions", [(0.9, 0.1, 0.1), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]
)
def test_fractions_must_be_a_partition(tmp_path: Path, fractions: tuple[float, float, float]) -> None:
    (tmp_path / "a").write_text("text")
    with pytest.raises(ConfigError, match="three shares above 0 that sum to 1"):
        open_text([tmp_path / "a"], "t", fractions=fractions, by_lines=False)


def test_choose_tokenizer() -> None:
    assert choose_tokenizer("wikitext103", "auto") == "words"
    assert choose_tokenizer("enwik8", "reference_symbols") == "reference_symbols"
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'reference_symbols': text is read as bytes"):
        choose_tokenizer("text", "reference_symbols")
