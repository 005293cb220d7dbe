"""Files of torch.save, and files that only look like it."""

import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.convert.from_reference import neutral_tensors
from megamoe.convert.published import MODULES, read_published
from megamoe.convert.published_config import run_config
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError, ConfigError
from tests.checkpoint.hostile import Bomb
from tests.convert.published import FOLDER

MODEL = FOLDER / "hyperrouter_tiny" / "model.pt"


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


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: Any) -> Path:
    """The archive with other contents and right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def replace_in_pickle(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, data: data.replace(old, new) if name.endswith("data.pkl") else data


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
    path = rewrite(one_tensor, tmp_path / "liar.pt", replace_in_pickle(old, new))
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


def read_all(path: Path) -> dict[str, torch.Tensor]:
    published = read_published(path)
    return {tensor.name: tensor.checked() for tensor in neutral_tensors(published, run_config(published))}


def damage(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(4)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(len(data))
        changed[at] = changed[at] ^ (1 << rng.randrange(8)) if kind == 2 else rng.randrange(256)
    return bytes(changed)


def test_damaged_files_are_refused_or_read_right(tmp_path: Path) -> None:
    original, data, path = read_all(MODEL), MODEL.read_bytes(), tmp_path / "damaged.pt"
    refused = 0
    for seed in range(150):
        path.write_bytes(damage(random.Random(seed), data))
        try:
            found = read_all(path)
        except CheckpointError:
            refused += 1
        else:
            assert found.keys() == original.keys()
            assert all(torch.equal(values, original[name]) for name, values in found.items())
    assert refused > 100


def test_changed_pickles_are_refused_or_read_within_bounds(tmp_path: Path) -> None:
    """With right checksums such a file is another file; it may be read, but as nothing but data."""
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        path = rewrite(
            MODEL, tmp_path / f"{seed}.pt", lambda n, d, r=rng: damage(r, d) if n.endswith("data.pkl") else d
        )
        try:
            assert all(isinstance(values, torch.Tensor) for values in read_all(path).values())
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 100


def test_stored_tensors_are_one_where_they_share_their_numbers(tmp_path: Path) -> None:
    a = torch.zeros(3)
    found = TorchFile(save(tmp_path / "file.pt", [a, a.detach(), torch.zeros(3)])).structure()
    assert all(isinstance(tensor, StoredTensor) for tensor in found)
    assert found[0] == found[1] != found[2]
