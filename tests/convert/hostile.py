"""Ways to damage exported folders and files of torch.save, see `tests.checkpoint.hostile`."""

import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.hostile import JUNK, NAMES, Bomb, sign

# Each is told with right checksums. Most are too long, too short, or of another type than what is stored.
LIES = [
    (b"FloatStorage", b"DoubleStorage"),
    (b"FloatStorage", b"IntStorage"),
    (b"FloatStorage", b"Storage"),
    (b"_rebuild_tensor_v2", b"_rebuild_tensor"),
    (b"torch._utils", b"builtins"),
    (b"_rebuild_tensor_v2", b"__class__"),
    (b"K\x10K\x10\x86", b"K\x10K\x11\x86"),
    (b"K\x10\x85", b"J\xff\xff\xff\x7f\x85"),
    (b"K\x10\x85", b"J\xff\xff\xff\xff\x85"),
    (b"K\x10K\x01\x86", b"J\xff\xff\xff\x7fK\x01\x86"),
    (b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00../data.pkl"),
    (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00\xff"),
    (b"layers.0", b"../../..", ),
    (b"layers", b"\x00\x00\x00\x00\x00\x00"),
    (b"cpu", b"cp\x00"),
]  # fmt: skip


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: Any) -> Path:
    """The archive with other contents and right checksums."""
    with zipfile.ZipFile(source) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(target, "w", **options) as new:
        for name, content in contents.items():
            new.writestr(name, change(name, content))
    return target


def in_pickle(change: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    return lambda name, data: change(data) if name.endswith("data.pkl") else data


def damage(rng: random.Random, data: bytes) -> bytes:
    """Cut short, with a piece cut out, with flipped bits, or with other bytes."""
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


def any_archive(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.rglob("*.pt")))


def damage_bytes(rng: random.Random, folder: Path) -> None:
    path = any_archive(rng, folder)
    path.write_bytes(damage(rng, path.read_bytes()))


def damage_pickle(rng: random.Random, folder: Path) -> None:
    path = any_archive(rng, folder)
    rewrite(path, path, in_pickle(lambda data: damage(rng, data)))


def lie_in_pickle(rng: random.Random, folder: Path) -> None:
    path, (old, new) = any_archive(rng, folder), rng.choice(LIES)
    count = rng.choice([1, 1, -1])
    rewrite(path, path, in_pickle(lambda data: data.replace(old, new, count)))


def lie_in_directory(rng: random.Random, folder: Path) -> None:
    """Change a number in the list of contents, which tells where members are and how long."""
    path = any_archive(rng, folder)
    with zipfile.ZipFile(path) as archive:
        begin = archive.start_dir
    data = bytearray(path.read_bytes())
    at = rng.randrange(begin, len(data) - 4)
    data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**16)]))
    path.write_bytes(data)


def compress(rng: random.Random, folder: Path) -> None:
    path = any_archive(rng, folder)
    kind = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    rewrite(path, path, lambda _, data: data, compression=kind)


def zip_bomb(rng: random.Random, folder: Path) -> None:
    path = any_archive(rng, folder)
    member = rng.choice(["data.pkl", "data/0", "byteorder"])
    zeros = bytes(1 << 24)
    rewrite(
        path, path, lambda n, d: zeros if n.endswith(member) else d,
        compression=rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED]), compresslevel=1,
    )  # fmt: skip


def add_member(rng: random.Random, folder: Path) -> None:
    path = any_archive(rng, folder)
    with zipfile.ZipFile(path, "a") as archive:
        name = rng.choice([archive.namelist()[0], "other/data.pkl", *NAMES[:7]])
        archive.writestr(name or "x", pickle.dumps(Bomb(folder.parent / "executed")))


def run_code(rng: random.Random, folder: Path) -> None:
    path, bomb = any_archive(rng, folder), Bomb(folder.parent / "executed")
    protocol = rng.choice([2, 3, 4, 5])
    if rng.random() < 0.5:
        torch.save({"module": bomb, "optimizer_state_dict": bomb}, path, pickle_protocol=protocol)
    else:
        rewrite(path, path, in_pickle(lambda data: pickle.dumps(bomb, protocol)))


def fill_memory(rng: random.Random, folder: Path) -> None:
    """Pickles of a few bytes that would be lists of lists of lists, deep or wide, or a very long number."""
    path = any_archive(rng, folder)
    wide = b"]q\x00" + b"]q\x01h\x00h\x00h\x00h\x00h\x00\x65".replace(b"\x65", b"") * 9
    pickles = [
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b".",
        b"\x80\x02" + b"]q\x00" + b"(h\x00h\x00h\x00eh\x00" * 50_000 + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
        b"\x80\x02" + wide + b".",
        b"\x80\x02}q\x00h\x00h\x00s.",
        b"",
        b"\x80\x7f.",
    ]
    chosen = rng.choice(pickles)
    rewrite(path, path, in_pickle(lambda data: chosen))


def exchange_files(rng: random.Random, folder: Path) -> None:
    first, second = any_archive(rng, folder), any_archive(rng, folder)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    if rng.random() < 0.5:
        second.write_bytes(content)


def lie_in_index(rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    body = json.loads(path.read_text())
    name, value = rng.choice(sorted(body["weight_map"].items()))
    lies: list[Callable[[], Any]] = [
        lambda: body["weight_map"].update({name: rng.choice([*NAMES, *JUNK])}),
        lambda: body["weight_map"].update({name: rng.choice(sorted(set(body["weight_map"].values())))}),
        lambda: body["weight_map"].update({rng.choice(NAMES): value}),
        lambda: body["weight_map"].pop(name),
        lambda: body.update(weight_map=rng.choice(JUNK)),
    ]
    rng.choice(lies)()
    path.write_text(json.dumps(body))
    sign(folder)


def lie_in_list(rng: random.Random, folder: Path) -> None:
    """In the list of hashes."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    sha256, name = lines[at].split("  ")
    lines[at] = rng.choice(
        [f"{sha256}  {rng.choice(NAMES)}", f"{sha256[::-1]}  {name}", "", "\x00", lines[at][1:]]
    )
    path.write_text("\n".join(lines) + "\n")
