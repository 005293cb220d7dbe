"""Exported models: a folder of plain safetensors files that other programs read too.

config.json                    model_type, architectures, torch_dtype, the run's config and state
model.safetensors              every tensor under its global name and in its shape
model.safetensors.index.json   instead of one file: which tensor is in which of several
tokenizer.json                 text to token ids
README.md                      model card
"""

import math
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamoe.checkpoint.format import CONFIG, DTYPES, MANIFEST, parse_object
from megamoe.checkpoint.state import TrainingState
from megamoe.config.load import from_dict
from megamoe.config.schema import RunConfig
from megamoe.errors import CheckpointError, ConfigError

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, CARD = "tokenizer.json", "README.md"
MODEL_TYPE = "megamoe"
BAKED = re.compile(r"layers\.\d+\.moe\.router\.(weight|bias)")
"""Names of generated routers, which an export holds besides what they are generated from."""
_TYPES = {code: dtype for dtype, code in DTYPES.values()}
_LARGEST_DOCUMENT = 1 << 28


def is_export(folder: Path) -> bool:
    """Whether `folder` looks like an exported model."""
    return not (folder / MANIFEST).exists() and any((folder / name).is_file() for name in (MODEL, INDEX))


class ExportReader:
    """An exported model. Opening reads its documents and the headers of its files.

    Raises:
        CheckpointError: it is incomplete or damaged, or of another program.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = self._object(CONFIG)
        if described.get("model_type") != MODEL_TYPE:
            raise self._error(
                f"{CONFIG}: model_type = {described.get('model_type')!r}: expected {MODEL_TYPE!r}"
            )
        try:
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
            return dict.fromkeys(self._open(MODEL).keys(), MODEL)
        weight_map = self._object(INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise self._error(f"{INDEX}: has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise self._error(f"{INDEX}: {name!r} is not the plain name of a file beside it")
        return weight_map

    def require_only(self, names: Collection[str]) -> None:
        """Refuse tensors that are not among `names`, generated routers aside.

        Raises:
            CheckpointError: naming the first.
        """
        for name in self.files:
            if name not in names and not BAKED.fullmatch(name):
                raise self._error(f"{name}: the config's model has no such tensor")

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(self.describe(name)[0]) for name in self.files)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor."""
        stored = self._stored(name)
        if stored.get_dtype() not in _TYPES:
            raise self._error(f"{name}: type {stored.get_dtype()} is not known here")
        return tuple(stored.get_shape()), _TYPES[stored.get_dtype()]

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor, which must have this shape.

        Raises:
            CheckpointError: it is missing or has another.
        """
        stored = self._stored(name)
        if tuple(stored.get_shape()) != shape:
            raise self._error(f"{name}: {stored.get_shape()}, but the config's model has {list(shape)}")
        return stored[:].clone() if shape else stored[...].clone()

    def _stored(self, name: str) -> Any:
        if name not in self.files:
            raise self._error(f"{name}: missing, but the config's model has it")
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise self._error(f"{self.files[name]}: {name}: {error}") from None

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._error(f"{name}: cannot be read ({error})") from None

    def _object(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            if path.stat().st_size > _LARGEST_DOCUMENT:
                raise self._error(f"{name}: holds {path.stat().st_size} bytes; too many for what it is")
            return parse_object(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(f"{name}: cannot be read ({error})") from None

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"exported model {str(self.folder)!r}: {problem}")
