"""Rows read into memory that is there already, against whole tensors that are sliced."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.file_ranges import _OPEN_FILES, FileRanges
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.errors import CheckpointError
from tests.checkpoint.small import some_tensors, write_small

NAME = "layers.0.moe.experts.w_in"
WEIGHT = some_tensors()["weight", NAME]


def row(reader: CheckpointReader, index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    into = torch.full(WEIGHT.shape[1:], float("nan"), dtype=dtype)
    reader.read_row(NAME, index, into)
    return into


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, 2 * _OPEN_FILES])
def test_rows_come_back_bit_for_bit_wherever_their_pieces_are(tmp_path: Path, n_shards: int) -> None:
    reader = CheckpointReader(write_small(tmp_path / "best", n_shards=n_shards))
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda place: row(reader, place % len(WEIGHT)), range(40)))
    assert torch.equal(torch.stack(rows), WEIGHT.repeat(10, 1, 1))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(write_small(tmp_path / "best", n_shards=1))
    with pytest.raises(CheckpointError, match=r"holds no weight 'absent'"):
        reader.read_row("absent", 0, torch.empty(3))
    with pytest.raises(CheckpointError, match=r"^checkpoint .*safetensors: .*holds F32, 240 bytes"):
        row(reader, 0, torch.bfloat16)
    (piece,) = reader.manifest.tensors["weight"][NAME].pieces
    ranges = FileRanges(reader.folder)
    with pytest.raises(CheckpointError, match=r"safetensors: absent: cannot be read"):
        ranges.read(piece.file, "absent", 0, torch.empty(3))
    with pytest.raises(CheckpointError, match=r"holds F32, 240 bytes"):
        ranges.read(piece.file, piece.key, 55, torch.empty(6))


@pytest.mark.parametrize("length", [0, 4, 100])
def test_files_cut_after_they_were_checked_are_refused(tmp_path: Path, length: int) -> None:
    reader = CheckpointReader(write_small(tmp_path / "best", n_shards=1))
    row(reader, 0)
    late = CheckpointReader(tmp_path / "best")
    (shard,) = (tmp_path / "best").glob("*.safetensors")
    with shard.open("r+b") as file:
        file.truncate(length)
    for opened in (reader, late):
        with pytest.raises(CheckpointError, match=r"^checkpoint '.*best': .*safetensors: .* cannot be read"):
            row(opened, 0)
