import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megamoe.config.schema import DataConfig
from megamoe.data import load_corpus
from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.data.prepared import verify
from megamoe.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("some words of a text\n" * 100)
    prepare(open_text([tmp_path / "text"], "mine", by_lines=False), tmp_path / "out", "bytes")
    return tmp_path / "out"


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_tokenizer(folder: Path, content: str) -> None:
    """With its hash in the manifest."""
    (folder / "tokenizer.json").write_text(content)
    edit_manifest(folder, tokenizer_sha256=hashlib.sha256(content.encode()).hexdigest())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "train.bin"), "train.bin.*1,889 bytes instead of 1,890"),
        (lambda folder: (folder / "test.bin").unlink(), "test.bin.*is damaged.*No such file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json.*is damaged.*No such file"),
        (lambda folder: flip_a_byte(folder / "tokenizer.json"), "tokenizer.json.*its hash is not"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json.*prepare_data"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json.*is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json.*is damaged"),
        (lambda folder: edit_manifest(folder, format="other 2"), "manifest.json.*format is not"),
        (lambda folder: edit_manifest(folder, surprise=1), "manifest.json.*is damaged.*surprise"),
        (lambda folder: edit_manifest(folder, splits={}), "manifest.json.*is damaged.*train"),
        (lambda folder: edit_manifest(folder, vocab_size=257), "manifest.json.*dtype 'uint8' is not that"),
        (lambda folder: edit_manifest(folder, dtype="object"), "manifest.json.*dtype 'object' is not that"),
        (lambda folder: replace_tokenizer(folder, "[" * 10**5), "tokenizer.json.*is damaged"),
        (lambda folder: replace_tokenizer(folder, "[]"), "tokenizer kind = None: unknown"),
        (lambda folder: replace_tokenizer(folder, '{"kind": []}'), r"tokenizer kind = \[\]: unknown"),
        (
            lambda folder: replace_tokenizer(folder, json.dumps({"kind": "words", "words": ["<eos>", "a"]})),
            "tokenizer.json.*words, not what the manifest says",
        ),
    ],
)  # fmt: skip
def test_damage_is_noticed_on_loading(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(DataConfig(dataset="text", path=str(folder)))
    assert "\n" not in str(caught.value)


def test_verify_compares_every_byte(folder: Path) -> None:
    assert verify(folder).name == "mine (true bytes)"
    flip_a_byte(folder / "valid.bin")
    with pytest.raises(DataError, match=r"valid\.bin.*its hash is not that of the manifest"):
        verify(folder)
