"""Labelled sentences in the forms in which they are published."""

from pathlib import Path

import pytest

from megamoe.config.schema import TaskConfig
from megamoe.data.labelled import LabelledText, load_labelled
from megamoe.data.overlap import fingerprints, from_text, overlap, to_text
from megamoe.errors import DataError


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(folder)


def pairs(text: LabelledText, split: str) -> list[tuple[str, str]]:
    return [(example.text, example.label) for example in text.splits[split]]


def numbered(n: int) -> str:
    return "sentence\tlabel\n" + "".join(f"sentence number {i} \t{i % 2}\n" for i in range(n))


def test_glue_sst2(tmp_path: Path) -> None:
    """Quotes merge no lines, the unlabelled test file is left alone, and dev is scored, not selected by."""
    dev = 'sentence\tlabel\n"a quote that never ends \t1\r\nthe next one" \t0\r\n'
    files = {"train.tsv": numbered(200), "dev.tsv": dev, "test.tsv": "index\tsentence\n0\tno label\n"}
    path = write(tmp_path, files)
    text = load_labelled(TaskConfig(name="sst2", path=path))
    assert text.labels == ("0", "1")
    assert text.is_sample
    assert pairs(text, "test") == [('"a quote that never ends', "1"), ('the next one"', "0")]
    assert "the dev file is the test, 10% of the training sentences select" in text.note
    train, valid = set(pairs(text, "train")), set(pairs(text, "valid"))
    assert len(train) + len(valid) == 200
    assert not train & valid
    assert 5 < len(valid) < 40
    assert load_labelled(TaskConfig(name="sst2", path=path)) == text
    more = load_labelled(TaskConfig(name="sst2", path=path, valid_fraction=0.5))
    assert valid < set(pairs(more, "valid"))


def test_sst5_trees(tmp_path: Path) -> None:
    tree = "(3 (2 It) (4 (2 's) (3 (2 -LRB-) (2 good))))\n"
    path = write(tmp_path, {"train.txt": tree, "dev.txt": "(0 (2 Bad) (2 .))\n", "test.txt": tree})
    text = load_labelled(TaskConfig(name="sst5", path=path))
    assert pairs(text, "train") == [("It 's ( good", "3")]
    assert pairs(text, "valid") == [("Bad .", "0")]
    assert len(text.labels) == 5


def test_imdb_folders(tmp_path: Path) -> None:
    files = {f"train/{label}/{i}_7.txt": f"review {label} {i}" for label in ("pos", "neg") for i in range(20)}
    files |= {"test/pos/0_9.txt": "Great.<br /><br />Really.", "train/unsup/0_0.txt": "nothing known"}
    text = load_labelled(TaskConfig(name="imdb", path=write(tmp_path, files), valid_fraction=0.3))
    assert pairs(text, "test") == [("Great. Really.", "pos")]
    assert len(text.splits["train"]) + len(text.splits["valid"]) == 40


def test_an_empty_imdb_review_is_refused(tmp_path: Path) -> None:
    files = {f"train/{label}/{i}_7.txt": f"review {label} {i}" for label in ("pos", "neg") for i in range(20)}
    files |= {"test/pos/0_9.txt": "<br /> "}
    with pytest.raises(DataError, match=r"0_9.txt: the sentence is empty"):
        load_labelled(TaskConfig(name="imdb", path=write(tmp_path, files), valid_fraction=0.3))


def test_banking77_takes_its_classes_from_the_training_file(tmp_path: Path) -> None:
    train = 'text,category\n"Where, please,\nis my card?",card_arrival\nWhy was I charged?,fee\n'
    files = {"train.csv": train + "".join(f"question {i},fee\n" for i in range(20)), "test.csv": train}
    text = load_labelled(TaskConfig(name="banking77", path=write(tmp_path, files), valid_fraction=0.3))
    assert text.labels == ("card_arrival", "fee")
    assert pairs(text, "test")[0] == ("Where, please, is my card?", "card_arrival")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.tsv": numbered(9)}, "has no labelled dev or test file in the form of SST-2"),
        ({"dev.tsv": numbered(9)}, "has no training file in the form of SST-2"),
        ({"train.tsv": numbered(9), "dev.tsv": "text\tlabel\n"}, "dev.tsv, line 1: expected a header"),
        ({"train.tsv": numbered(9), "dev.tsv": "sentence\tlabel\na\t1\t2\n"}, "line 2: has 3 fields"),
        ({"train.tsv": numbered(9), "dev.tsv": "sentence\tlabel\na\t7\n"}, "line 2: label '7' is not one"),
        ({"train.tsv": numbered(9), "dev.tsv": "sentence\tlabel\n \t1\n"}, "line 2: the sentence is empty"),
        ({"train.tsv": numbered(1), "dev.tsv": numbered(2)}, "task.valid_fraction = 0.1: leaves no"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_labelled(TaskConfig(name="sst2", path=write(tmp_path, files)))


def test_what_is_not_bundled_is_asked_for() -> None:
    with pytest.raises(DataError, match=r"^task.path: no text of imdb is bundled; give the folder aclImdb"):
        load_labelled(TaskConfig(name="imdb"))


def test_bundled_splits_share_nothing() -> None:
    text = load_labelled(TaskConfig(name="sst2"))
    assert "it is not SST-2" in text.note
    assert {split: len(examples) for split, examples in text.splits.items()} == {
        "train": 8530, "valid": 1066, "test": 1066,
    }  # fmt: skip
    prints = {split: fingerprints(e.text for e in examples) for split, examples in text.splits.items()}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert overlap((e.text for e in text.splits[one]), prints[other]).shared == 0


def test_overlap_sees_through_spelling() -> None:
    trained_on = fingerprints(["it's a ( fine ) cliché , isn't it ?", "another"])
    found = overlap(["It 's a -LRB- fine -RRB- cliche, is n't it", "a third"], from_text(to_text(trained_on)))
    assert (found.shared, found.total) == (1, 2)
    with pytest.raises(
        DataError, match=r"^task.max_overlap = 0.4: 1 of the 2 sentences of the test split of SST-2 were tr"
    ):
        found.require_below(0.4, "test", "SST-2")
    found.require_below(0.5, "test", "SST-2")
    with pytest.raises(DataError, match="damaged"):
        from_text("no base 64 ")
