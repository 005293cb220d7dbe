"""The folder of a prepared corpus: memory-mapped tokens, the tokenizer, and a manifest of both.

* ``manifest.json``: names, unit, counts, sizes, hashes, origin
* ``tokenizer.json``: the tokenizer, vocabulary included
* ``train.bin``, ``valid.bin``, ``test.bin``: token ids, little-endian, in the manifest's dtype
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.data.encoding import SPLITS
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
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` in one step if all goes well and vanishes if not.

    Raises:
        DataError: `folder` exists with something in it, or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"output {str(folder)!r}: exists already; remove it or name another folder")
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staging.rename(folder)
    except OSError as error:
        raise DataError(f"output {str(folder)!r}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_tokens(path: Path, blocks: Iterable[Ids]) -> TokenFile:
    """Write the ids of one split.

    Raises:
        DataError: there are none.
    """
    n_tokens, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            content = block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes()
            n_tokens += len(block)
            digest.update(content)
            file.write(content)
    if not n_tokens:
        raise DataError(f"{path.stem}: holds no tokens; give it more text")
    return TokenFile(n_tokens, path.stat().st_size, digest.hexdigest())


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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    return Tokenizer.from_dict(json.loads(content))


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
