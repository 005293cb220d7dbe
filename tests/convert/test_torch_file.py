"""Files of torch.save, and files that only look like it."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.convert.published import MODULES, read_published
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError
from tests.checkpoint.hostile import Bomb
from tests.convert.hostile import in_pickle, rewrite


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_tensors_are_those_that_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(60).view(3, 4, 5).to(dtype)
    values = {
        "whole": base,
        "view": base[1:, :, 2],
        "turned": base.mT,
        "scalar": base[1, 1, 1],
        "none": base[:0],
    }
    found = TorchFile(save(tmp_path / "file.pt", values)).structure()
    assert found.keys() == values.keys()
    for name, expected in values.items():
        assert torch.equal(found[name].load(), expected)
        assert found[name].load().is_contiguous()


@pytest.fixture
def one_tensor(tmp_path: Path) -> Path:
    return save(tmp_path / "one.pt", {"w": torch.arange(1000.0)})


def test_never_runs_code(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.pt", {"weight": Bomb(tmp_path / "trace")})
    with pytest.raises(CheckpointError, match=r"posix.mkdir.*refused"):
        TorchFile(path, MODULES).structure()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xe8\x03", b"\xe9\x03"),  # 1001 numbers
        (b"FloatStorage", b"DoubleStorage"),
        (b"FloatStorage", b"Storage"),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor"),
        (b"M\xe8\x03\x85", b"J\xff\xff\xff\x7f\x85"),  # a shape larger than the storage
        (b"M\xe8\x03\x85", b"J\xff\xff\xff\xff\x85"),
        (b"K\x01\x85", b"M\xe8\x03\x85"),  # a stride that leaves it
        (b"K\x00M\xe8\x03\x85", b"K\x01M\xe8\x03\x85"),  # an offset that does
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"),  # a storage that is not there
        (b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00../data.pkl"),
    ],
)
def test_lies_about_sizes_are_refused(one_tensor: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(one_tensor) as archive:
        assert old in archive.read("one/data.pkl"), "the lie must be told"
    path = rewrite(one_tensor, tmp_path / "liar.pt", in_pickle(lambda data: data.replace(old, new)))
    with pytest.raises(CheckpointError):
        TorchFile(path).structure()["w"].load()


def test_compressed_members_are_refused(one_tensor: Path, tmp_path: Path) -> None:
    path = rewrite(one_tensor, tmp_path / "bomb.pt", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(path)


def test_members_that_overlap_are_refused(one_tensor: Path, tmp_path: Path) -> None:
    data = one_tensor.read_bytes()
    with zipfile.ZipFile(one_tensor) as archive:
        directory = archive.start_dir
    # The directory says that the member "byteorder", 6 bytes, is as long as the storage before it.
    changed = data[directory:].replace(struct.pack("<II", 6, 6), struct.pack("<II", 4000, 4000))
    assert changed != data[directory:]
    (tmp_path / "overlap.pt").write_bytes(data[:directory] + changed)
    with pytest.raises(CheckpointError, match="claim more bytes"):
        TorchFile(tmp_path / "overlap.pt")


def test_a_flipped_bit_in_a_storage_is_noticed_in_a_part_of_it_too(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    path = save(tmp_path / "file.pt", {"whole": base, "part": base[:10]})
    data = bytearray(path.read_bytes())
    data[data.find(struct.pack("<f", 900.0))] ^= 1
    path.write_bytes(data)
    for name in ("whole", "part"):
        with pytest.raises(CheckpointError, match="storage 0: cannot be read"):
            TorchFile(path).structure()[name].load()


def test_other_byte_orders_and_old_files_are_named(one_tensor: Path, tmp_path: Path) -> None:
    big = rewrite(one_tensor, tmp_path / "big.pt", lambda n, d: b"big" if n.endswith("byteorder") else d)
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(big)
    torch.save({"w": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch before 1\.6"):
        TorchFile(tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchFile(tmp_path / "missing.pt")


def test_modules_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    layer.inner = torch.nn.ModuleList([torch.nn.ReLU()])
    layer.inner[0].outer = layer
    torch.save(layer, tmp_path / "cycle.pt")
    with pytest.raises(CheckpointError, match="its modules are not those of a model"):
        read_published(tmp_path / "cycle.pt")


def test_stored_tensors_are_one_where_they_share_their_numbers(tmp_path: Path) -> None:
    a = torch.zeros(3)
    found = TorchFile(save(tmp_path / "file.pt", [a, a.detach(), torch.zeros(3)])).structure()
    assert all(isinstance(tensor, StoredTensor) for tensor in found)
    assert found[0] == found[1] != found[2]
