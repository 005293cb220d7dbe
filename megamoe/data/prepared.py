"""The folder of a prepared corpus: memory-mapped tokens, the tokenizer, and a manifest of both.

* ``manifest.json``: names, unit, counts, sizes, hashes, origin
* ``tokenizer.json``: the tokenizer, vocabulary included
* ``train.bin``, ``valid.bin``, ``test.bin``: token ids, little-endian, in the manifest's dtype
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.data.encoding import SPLITS
from megamoe.data.ranks import ALONE, Ranks
from megamoe.data.sources import Fingerprint
from megamoe.data.tokenizers import Ids, Tokenizer, token_dtype
from megamoe.errors import DataError

FORMAT = "megamoe tokens 1"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class TokenFile:
    """Size and hash of the token ids of one split."""

    n_tokens: int
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        dataset: the corpus' name in `data.dataset`.
        name: honest name of figures measured on it.
        unit: what one token is.
        is_sample: True if such figures do not compare with published ones.
        note: a sentence on what the name cannot say.
        tokenizer: its kind, as in `data.tokenizer`.
        tokenizer_sha256: hash of the tokenizer file.
        vocab_size: number of ids.
        dtype: type of the ids in the token files.
        splits: token files by split.
        words_per_token: words per subword of the held-out splits; None for other units.
        origin: what the corpus was made from.
    """

    dataset: str
    name: str
    unit: str
    is_sample: bool
    note: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    splits: dict[str, TokenFile]
    words_per_token: dict[str, float] | None
    origin: list[Fingerprint]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        values: dict[str, Any] = json.loads(text)
        if values.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT!r}")
        if values["dtype"] != token_dtype(values["vocab_size"]).name:
            raise ValueError(f"dtype {values['dtype']!r} is not that of {values['vocab_size']} ids")
        values["splits"] = {split: TokenFile(**values["splits"][split]) for split in SPLITS}
        values["origin"] = [Fingerprint(**item) for item in values["origin"]]
        return cls(**values)


@contextmanager
def new_folder(folder: Path, ranks: Ranks = ALONE) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` in one step if all goes well and vanishes if not.

    Raises:
        DataError: `folder` exists with something in it, cannot be written, or is not seen by all ranks.
    """
    main_pid = ranks.combine(os.getpid(), lambda pids: pids[0])
    place = folder.resolve()  # "." has no name
    staging = place.with_name(f".{place.name}.partial-{main_pid}")
    try:
        ranks.combine(None, lambda _: _make(staging, folder))
        # Rank 0 may take the folder away only when nobody writes there any more.
        with ranks.together():
            if not staging.is_dir():
                raise DataError(
                    f"output {str(folder)!r}: {socket.gethostname()} does not see it; name a folder that all"
                    " nodes share"
                )
            yield staging
        ranks.combine(None, lambda _: _publish(staging, place))
    except OSError as error:
        raise DataError(f"output {str(folder)!r}: cannot be written ({error.strerror})") from None
    finally:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)


def _make(staging: Path, folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"output {str(folder)!r}: exists already; remove it or name another folder")
    staging.mkdir(parents=True)


def _publish(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.rename(folder)


def write_tokens(path: Path, blocks: Iterable[Ids], ranks: Ranks = ALONE) -> TokenFile:
    """Write the ids of one split: each rank its share, which rank 0 joins in order of rank.

    Parts, because ranks on several nodes cannot safely write into one file on a network file system.

    Raises:
        DataError: there are none.
    """
    part = path if ranks.is_main else path.with_name(f"{path.name}.{ranks.rank:05}")
    n_tokens = 0
    with part.open("wb") as file:
        for block in blocks:
            n_tokens += len(block)
            file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes())
    return ranks.combine((part, n_tokens), _join)


def _join(parts: list[tuple[Path, int]]) -> TokenFile:
    """Append the files of all other ranks to the first."""
    (path, _), *others = parts
    with path.open("ab") as file:
        for part, _ in others:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)
            part.unlink()
    n_tokens = sum(n for _, n in parts)
    if not n_tokens:
        raise DataError(f"{path.stem}: holds no tokens; give it more text")
    with path.open("rb") as file:
        return TokenFile(n_tokens, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> str:
    """Write the tokenizer file and return its sha256."""
    content = json.dumps(tokenizer.to_dict(), ensure_ascii=False).encode()
    (folder / TOKENIZER).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: the folder or its manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"data.path = {str(folder)!r}: has no readable {MANIFEST} ({error.strerror});"
            " make the folder with tools/prepare_data.py"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"is no manifest of {FORMAT!r}, {error!r}") from None


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder.

    Raises:
        DataError: its file is missing, or is not the one that the manifest names.
    """
    path = folder / TOKENIZER
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise _damaged(path, "its hash is not that of the manifest")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)[:80]) from None
    tokenizer = Tokenizer.from_dict(values)
    if (tokenizer.kind, tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
        raise _damaged(path, f"{tokenizer.vocab_size} {tokenizer.kind}, not what the manifest says")
    return tokenizer


def map_tokens(folder: Path, manifest: Manifest) -> dict[str, Ids]:
    """The ids of every split, memory-mapped and read-only.

    Raises:
        DataError: a token file is missing or has another size than the manifest says.
    """
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    tokens: dict[str, Ids] = {}
    for split, expected in manifest.splits.items():
        path = folder / f"{split}.bin"
        try:
            n_bytes = path.stat().st_size
        except OSError as error:
            raise _damaged(path, str(error.strerror)) from None
        if not n_bytes == expected.n_bytes == expected.n_tokens * dtype.itemsize:
            raise _damaged(path, f"{n_bytes:,} bytes instead of {expected.n_bytes:,}")
        if not expected.n_tokens:
            raise _damaged(path, "it holds no token")
        tokens[split] = np.memmap(path, dtype, mode="r", shape=(expected.n_tokens,))
    return tokens


def verify(folder: Path) -> Manifest:
    """Read a whole prepared folder and compare every hash; a copy over a network may need it.

    Raises:
        DataError: something is missing or differs from the manifest.
    """
    manifest = read_manifest(folder)
    read_tokenizer(folder, manifest)
    map_tokens(folder, manifest)
    for split, expected in manifest.splits.items():
        path = folder / f"{split}.bin"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise _damaged(path, "its hash is not that of the manifest")
    return manifest


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{str(path)!r}: is damaged ({what}); copy or prepare the folder again")
