"""Exported models: a folder of plain safetensors files that other programs read too.

config.json                    model_type, architectures, torch_dtype, the run's config and state
model.safetensors              every tensor under its global name and in its shape
model.safetensors.index.json   instead of one file: which tensor is in which of several
tokenizer.json                 text to token ids
README.md                      model card
SHA256SUMS                     hashes of all but the card, as `sha256sum -c` reads them
"""

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megamoe.checkpoint.dtypes import DTYPES, dtype_name, empty
from megamoe.checkpoint.file_ranges import FileRanges
from megamoe.checkpoint.format import CONFIG, LARGEST_DOCUMENT, MANIFEST, parse_object
from megamoe.checkpoint.mapped_files import MappedFiles
from megamoe.checkpoint.state import TrainingState
from megamoe.config.load import from_dict
from megamoe.config.schema import RunConfig
from megamoe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, CARD, SUMS = "tokenizer.json", "README.md", "SHA256SUMS"
MODEL_TYPE = "megamoe"
BAKED = re.compile(r"layers\.\d+\.moe\.router\.(weight|bias)")
"""Names of generated routers, which an export holds besides what they are generated from."""
_TYPES = {dtype.code: name for name, dtype in DTYPES.items()}
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9_.-]{0,199})")
_CORRUPT = f"its hash differs from the one in {SUMS}; it is corrupt or was changed (then remove {SUMS})"


def is_export(folder: Path) -> bool:
    """Whether `folder` looks like an exported model."""
    return not (folder / MANIFEST).exists() and any((folder / name).is_file() for name in (MODEL, INDEX))


class ExportReader:
    """An exported model. Opening reads its documents, tensors and the headers of their files on demand.

    Attributes:
        folder: where it is.
        sums: SHA-256 of its files by name; None where it holds no hashes.
        dtype: type of its weights; routers may keep float32.
        buffers: names of the tensors that are no parameters of the model, as far as it tells.
        config: config of the run.
        state: state of the run.

    Raises:
        CheckpointError: it is incomplete or damaged, or of another program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums = self._sums()
        self._mapped, self._ranges = MappedFiles(folder), FileRanges(folder)
        described = self._object(CONFIG)
        if described.get("model_type") != MODEL_TYPE:
            raise self._error(
                f"{CONFIG}: model_type = {described.get('model_type')!r}: expected {MODEL_TYPE!r}"
            )
        try:
            self.dtype: str = described["torch_dtype"]
            self.buffers = frozenset(map(str, described.get("buffers", ())))
            self.config: RunConfig = from_dict(described["config"])
            state = described["state"] | {"tokenizer": self._object(TOKENIZER)}
            self.state = TrainingState.from_dict(state)
        except (ConfigError, CheckpointError) as error:
            raise self._error(f"{CONFIG}: {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise self._error(f"{CONFIG}: is incomplete ({error!r})") from None

    @cached_property
    def files(self) -> Mapping[str, str]:
        """File of every tensor by its name."""
        if not (self.folder / INDEX).is_file():
            return dict.fromkeys(self._header(MODEL), MODEL)
        weight_map = self._object(INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise self._error(f"{INDEX}: has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise self._error(f"{INDEX}: {name!r} is not the plain name of a file beside it")
        return weight_map

    @cached_property
    def described(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor by its name."""
        headers = {file: self._header(file) for file in sorted(set(self.files.values()))}
        described = {}
        for name, file in self.files.items():
            if name not in headers[file]:
                raise self._error(f"{file}: holds no {name}")
            shape, code = headers[file][name]
            if code not in _TYPES:
                raise self._error(f"{name}: type {code} is not known here")
            dtype = _TYPES[code]
            if DTYPES[dtype].is_floating and dtype not in (self.dtype, "float32"):
                raise self._error(f"{name}: is {dtype}, but {CONFIG} says torch_dtype = {self.dtype!r}")
            described[name] = (shape, dtype)
        return described

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape, _ in self.described.values())

    def require_only(self, names: Collection[str]) -> None:
        """Refuse tensors that are not among `names`, generated routers aside.

        Raises:
            CheckpointError: naming the first.
        """
        for name in self.files:
            if name not in names and not BAKED.fullmatch(name):
                raise self._error(f"{name}: the config's model has no such tensor")

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.described:
            raise self._error(f"{name}: missing, but the config's model has it")
        return self.described[name]

    def tensor(self, name: str, shape: tuple[int, ...]) -> "torch.Tensor":
        """A tensor, which must have this shape.

        Raises:
            CheckpointError: it is missing or has another.
        """
        self.require_shape(name, shape)
        stored = self._stored(name)
        return stored[:].clone() if shape else stored[...].clone()

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape.

        Raises:
            CheckpointError: it is missing or has another.
        """
        found, _ = self.describe(name)
        if found != shape:
            raise self._error(f"{name}: {list(found)}, but the config's model has {list(shape)}")

    def read_row(self, name: str, index: int, into: "torch.Tensor") -> None:
        """Row `index` of a weight into a contiguous tensor of its shape, no other; any thread may ask.

        Raises:
            CheckpointError: it cannot be read.
        """
        file, dtype = self.files[name], self.describe(name)[1]
        stored = into if dtype == dtype_name(into.dtype) else empty(into.shape, dtype)
        try:
            self._ranges.read(self._listed(file).name, name, index * into.numel(), stored)
        except CheckpointError as error:
            raise self._error(str(error)) from None
        if stored is not into:
            into.copy_(stored)

    def release(self, n_bytes: int) -> None:
        """Tell that `n_bytes` were read and are done with: files do not occupy memory for long then."""
        self._mapped.release(n_bytes)

    def verify_files(self) -> None:
        """Compare every file with its hash, if there are hashes.

        Raises:
            CheckpointError: naming the first file that is missing or differs.
        """
        for name, expected in (self.sums or {}).items():
            try:
                with self._plain(name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._error(f"{name}: cannot be read ({error})") from None
            if found != expected:
                raise self._error(f"{name}: {_CORRUPT}")

    def _stored(self, name: str) -> Any:
        """A tensor in its file, which can be sliced."""
        file = self.files[name]
        try:
            return self._mapped.slice(self._listed(file).name, name)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{file}: {name}: {error}") from None

    def _header(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and code of the type of every tensor in a file."""
        try:
            with safe_open(self._listed(file), framework="np") as opened:  # that of torch would import it
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise self._error(f"{file}: cannot be read ({error})") from None

    def _sums(self) -> dict[str, str] | None:
        if not (self.folder / SUMS).exists():
            return None
        lines = self._text(SUMS).splitlines()
        matches = [_SUM.fullmatch(line) for line in lines]
        sums = {match[2]: match[1] for match in matches if match}
        if len(sums) < len(lines) or not lines:
            raise self._error(f"{SUMS}: is not a list of hashes and the names of files beside it")
        return sums

    def _listed(self, name: str) -> Path:
        """The path of a file that there is a hash of, if there are hashes."""
        if self.sums is not None and name not in self.sums:
            raise self._error(f"{name}: is not listed in {SUMS}")
        return self._plain(name)

    def _plain(self, name: str) -> Path:
        """The path of a file, which is no folder and no pipe that would be waited for."""
        if not (self.folder / name).is_file():
            raise self._error(f"{name}: missing, or not a plain file")
        return self.folder / name

    def _object(self, name: str) -> dict[str, Any]:
        path, text = self._listed(name), self._text(name)
        if self.sums and hashlib.sha256(text.encode()).hexdigest() != self.sums[name]:
            raise self._error(f"{name}: {_CORRUPT}")
        return parse_object(text, str(path))

    def _text(self, name: str) -> str:
        try:
            path = self._plain(name)
            if path.stat().st_size > LARGEST_DOCUMENT:
                raise self._error(f"{name}: holds {path.stat().st_size} bytes; too many for what it is")
            return path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(f"{name}: cannot be read ({error})") from None

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"exported model {str(self.folder)!r}: {problem}")
