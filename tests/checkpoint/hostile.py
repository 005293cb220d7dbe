"""Ways to damage a checkpoint, by accident and on purpose; each is a function of a seeded generator.

What changes bytes alone is caught by hashes. What lies signs its lie: hashes and sizes in the manifest are
made right again, so that everything behind them is put to the test.
"""

import hashlib
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], None]

SIGNATURES = ("manifest.json", "SHA256SUMS")
"""What holds the hashes of the other files."""

HUGE = [2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, -(2**63)]
JUNK: list[Any] = [*HUGE, 0, 1.5, True, None, "", "x", "\x00", [], {}, [1], {"a": 1}, "../../x", 1e300]
NAMES = [
    "../shard", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "\x00", "manifest.json", "CON\n", "config.json",
    "~", "é", "x" * 5000,
]  # fmt: skip
TEXTS = [
    "[" * 50_000, '{"a":' * 50_000, '{"step": NaN}', '{"step": 1e999}', '{"step": Infinity}', "null", "",
    '{"step": ' + "9" * 6000 + "}", '{"step": 1, "step": 2}', "\ufeff{}", '"' + "x" * 100_000, "{" + " " * 99,
]  # fmt: skip


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def any_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])


def any_shard(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def truncate(rng: random.Random, folder: Path) -> None:
    path = any_file(rng, folder)
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_bits(rng: random.Random, folder: Path) -> None:
    path = any_file(rng, folder)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def append(rng: random.Random, folder: Path) -> None:
    with any_file(rng, folder).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 64)))


def replace_by_pickle(rng: random.Random, folder: Path) -> None:
    path = any_file(rng, folder)
    content = pickle.dumps(Bomb(folder.parent / "executed"))
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))
    if path.name not in SIGNATURES and rng.random() < 0.5:
        sign(folder)


def replace_by_other_thing(rng: random.Random, folder: Path) -> None:
    path, target = any_file(rng, folder), any_file(rng, folder)
    content = path.read_bytes()
    path.unlink()
    what = rng.randrange(5)
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    elif what == 2:
        path.symlink_to("/dev/zero")
    elif what == 3:
        path.symlink_to(target.resolve() if target != path else "/etc/passwd")
    else:
        elsewhere = folder.parent / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)


def swap_shards(rng: random.Random, folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def lie_in_manifest(rng: random.Random, folder: Path) -> None:
    body = json.loads((folder / "manifest.json").read_text())
    kind = rng.choice(sorted(body["tensors"]))
    name = rng.choice(sorted(body["tensors"][kind]))
    entry = body["tensors"][kind][name]
    piece = rng.choice(entry["pieces"])
    file = body["files"][rng.choice(sorted(body["files"]))]
    lies: list[Callable[[], Any]] = [
        lambda: entry["shape"].append(rng.choice([2, *JUNK[:8]])),
        lambda: entry.update(shape=[*entry["shape"], *[1] * rng.choice([1, 9, 70])]),
        lambda: entry.update(shape=[0, *HUGE[:3]]),
        lambda: entry["shape"].__setitem__(0, rng.choice(JUNK)),
        lambda: entry.update(shape=rng.choice(JUNK)),
        lambda: entry.update(dtype=rng.choice(["float64", "int32", "bool", "F32", *map(str, JUNK)])),
        lambda: entry.update(pieces=rng.choice(JUNK)),
        lambda: piece.__setitem__(rng.randrange(4), rng.choice(JUNK)),
        lambda: piece.__setitem__(0, rng.choice(NAMES)),
        lambda: piece.__setitem__(1, piece[1] + "x"),
        lambda: piece.__setitem__(3, piece[3] + rng.choice([1, -1, *HUGE[:4]])),
        lambda: entry["pieces"].append(list(piece)),
        lambda: body["tensors"][kind].pop(name),
        lambda: body["tensors"][kind].update({rng.choice(NAMES): entry}),
        lambda: body["tensors"].update({rng.choice(["pickle", "gradient", "__proto__"]): {name: entry}}),
        lambda: body["tensors"].update({kind: rng.choice(JUNK)}),
        lambda: body["files"].update({rng.choice(NAMES): file}),
        lambda: body["files"].pop(rng.choice(sorted(body["files"]))),
        lambda: file.update(bytes=rng.choice(JUNK)),
        lambda: file.update(sha256=rng.choice(JUNK)),
        lambda: body.update({rng.choice(["files", "tensors", "format", "version"]): rng.choice(JUNK)}),
    ]  # fmt: skip
    rng.choice(lies)()
    write_manifest(folder, body)


def lie_in_header(rng: random.Random, folder: Path) -> None:
    path = any_shard(rng, folder)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    lies: list[Callable[[], Any]] = [
        lambda: entry.update(dtype=rng.choice(["F64", "I32", "U8", "F8_E4M3", "pickle", 3, None])),
        lambda: entry.update(shape=rng.choice([[2], [2**40], [2**63], [-1], [1, 1], "x", None, [2**32] * 3])),
        lambda: entry["data_offsets"].__setitem__(rng.randrange(2), rng.choice(JUNK[:12])),
        lambda: entry.update(data_offsets=rng.choice([[0, 2**63], [5, 1], [], None, [0]])),
        lambda: header.update({rng.choice([*NAMES[:9], key + "x"]): header.pop(key)}),
        lambda: header.pop(key),
        lambda: header.update(extra=entry),
    ]
    rng.choice(lies)()
    text = json.dumps(header)
    if rng.random() < 0.3:
        text = rng.choice([text + text, text[:-1], '{"a":' * 50_000, "[" * 50_000, "\x00" * 16, "", text * 3])
    size = rng.choice([len(text)] * 3 + [0, 2**40, 2**63, len(text) + 8, max(len(text) - 8, 0)])
    path.write_bytes(struct.pack("<Q", size) + text.encode() + data)
    sign(folder)


def lie_in_document(rng: random.Random, folder: Path) -> None:
    path = rng.choice([path for path in sorted(folder.glob("*.json")) if path.name not in SIGNATURES])
    body = json.loads(path.read_text())
    owner = body
    while True:
        key = rng.choice(sorted(owner))
        if not isinstance(owner[key], dict) or not owner[key] or rng.random() < 0.2:
            break
        owner = owner[key]
    rng.choice([
        lambda: owner.update({key: rng.choice(JUNK)}),
        lambda: owner.update({key: rng.choice(HUGE)}),
        lambda: owner.update({rng.choice(["zip", "__class__", "step", "model"]): rng.choice(JUNK)}),
        lambda: owner.pop(key),
    ])()  # fmt: skip
    path.write_text(json.dumps(body))
    sign(folder)


def break_json(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    at = text.index("{") + 1
    path.write_text(
        rng.choice(
            [*TEXTS, f'{text[:at]}"a": NaN, {text[at:]}', f'{text[:at]}"step": 3, {text[at:]}', text + "}"]
        )
    )
    if path.name not in SIGNATURES:
        sign(folder)


def sign(folder: Path) -> None:
    """Make sizes and hashes in the manifest, or in the list of an export, those of the files.

    Files of torch.save hold checksums of their own.
    """
    if (folder / "SHA256SUMS").is_file():
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in signed(folder)}
        (folder / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, sha256 in hashes.items()))
        return
    if not (folder / "manifest.json").is_file():
        return
    body = json.loads((folder / "manifest.json").read_text())
    for name in body["files"]:
        content = (folder / name).read_bytes()
        body["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, body)


def signed(folder: Path) -> list[Path]:
    """The files of an export that its list of hashes names."""
    return [path for path in sorted(folder.iterdir()) if path.name not in ("SHA256SUMS", "README.md")]


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (folder / "manifest.json").write_text(
        json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    )


MUTATIONS: tuple[Mutation, ...] = (
    truncate, flip_bits, append, replace_by_pickle, replace_by_other_thing, swap_shards, lie_in_manifest,
    lie_in_manifest, lie_in_header, lie_in_document, lie_in_document, break_json,
)  # fmt: skip
