"""The manifest of many shards."""

from itertools import permutations
from pathlib import Path

import pytest

from megamoe.checkpoint import shard as shard_module
from megamoe.checkpoint.format import CONFIG, STATE, Piece, StoredFile, TensorEntry
from megamoe.checkpoint.shard import Shard, merge, write_documents
from megamoe.errors import CheckpointError

DOCUMENTS = {name: StoredFile(2, "00") for name in (CONFIG, STATE)}


def shard(number: int, shape: tuple[int, ...] = (2, 3)) -> Shard:
    """Two elements of each of two tensors."""
    file = f"shard-{number}"
    entries = tuple(
        ("weight", name, TensorEntry(shape, "float32", (Piece(file, name, 2 * number, 2 * number + 2),)))
        for name in ("a", "b")
    )
    return Shard(file, StoredFile(99, "00"), entries)


def test_shards_may_come_in_any_order() -> None:
    for order in permutations(range(3)):
        manifest = merge(map(shard, order), DOCUMENTS)
        for name in ("a", "b"):
            pieces = manifest.tensors["weight"][name].pieces
            assert [(piece.file, piece.start) for piece in pieces] == [
                ("shard-0", 0), ("shard-1", 2), ("shard-2", 4),
            ]  # fmt: skip


def test_a_tensor_of_two_shapes_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"weight a: float32 \[3, 2\] in shard-1, float32 \[2, 3\]"):
        merge([shard(0), shard(1, (3, 2))], DOCUMENTS)


def test_a_manifest_that_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, texts = list(map(shard, range(3))), dict.fromkeys(DOCUMENTS, "{}")
    write_documents(tmp_path, texts, shards)
    n_bytes = (tmp_path / "manifest.json").stat().st_size
    monkeypatch.setattr(shard_module, "LARGEST_DOCUMENT", n_bytes - 1)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match=rf"{n_bytes} bytes for 3 shards: {n_bytes - 1} can be read"):
        write_documents(other, texts, shards)
    assert not (other / "manifest.json").exists()
