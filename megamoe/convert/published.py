"""Models of the published implementations: their tensors by name and their settings, as data."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megamoe.convert.pickles import Record
from megamoe.convert.torch_file import StoredTensor, TorchFile
from megamoe.errors import CheckpointError

# Where the published classes are defined, in HyperRouter, SMoE-Dropout and Transformer-XL.
MODULES = (
    "mem_transformer",
    "custom_transformer",
    "custom_layers",
    "custom_gate",
    "linear",
    "fmoe.gates.base_gate",
    "fmoe.gates.naive_gate",
    "proj_adaptive_softmax",
    "utils.proj_adaptive_softmax",
    "torch.nn.*",
)
_DEEPEST, _MOST_MODULES, _MOST_TENSORS = 16, 100_000, 400_000
_MODULE_NAME = re.compile(r"\w{1,64}")


@dataclass(frozen=True)
class PublishedModel:
    """A model as its file describes it.

    Attributes:
        path: the file.
        tensors: by published name, in the order of its state dict.
        modules: by path, each module's class name and attributes; none where the file is a state dict.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    modules: Mapping[str, tuple[str, Mapping[str, Any]]]

    def attribute(self, module: str, name: str) -> Any:
        """An attribute of a module if it is plain data, else None."""
        value = self.modules.get(module, ("", {}))[1].get(name)
        items = value if isinstance(value, list) else [value]
        return value if all(isinstance(item, bool | int | float | str) for item in items) else None


def read_published(path: Path) -> PublishedModel:
    """The model in a file of torch.save: a whole pickled model, or its state dict.

    Raises:
        CheckpointError: it is neither, or it cannot be read.
    """
    content = TorchFile(path, MODULES).structure()
    if isinstance(content, Record):
        modules = dict(_modules(content, path))
        tensors = dict(islice(_tensors(modules), _MOST_TENSORS + 1))
        if len(tensors) > _MOST_TENSORS:
            raise CheckpointError(f"file {str(path)!r}: has more tensors than any model")
        described = {prefix: (record.type.name, record.state) for prefix, record in modules.items()}
        return PublishedModel(path, tensors, described)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(_is_tensor, content.items())):
        raise CheckpointError(f"file {str(path)!r}: holds no model and no state dict")
    parallel = all(name.startswith("module.") for name in content)
    return PublishedModel(
        path, {n.removeprefix("module.") if parallel else n: t for n, t in content.items()}, {}
    )


def _is_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], StoredTensor)


def _modules(root: Record, path: Path) -> Iterator[tuple[str, Record]]:
    """A module and all below it by path, in the order of a state dict."""
    waiting = [("", root, 0)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return
        prefix, record, depth = waiting.pop()
        yield prefix, record
        children = record.state.get("_modules", {})
        if not isinstance(children, dict) or depth == _DEEPEST:
            break
        named = [(name, child) for name, child in children.items() if isinstance(child, Record)]
        if not all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name, _ in named):
            break
        waiting += [(f"{prefix}.{name}".lstrip("."), child, depth + 1) for name, child in reversed(named)]
    raise CheckpointError(f"file {str(path)!r}: its modules are not those of a model")


def _tensors(modules: Mapping[str, Record]) -> Iterator[tuple[str, StoredTensor]]:
    for prefix, record in modules.items():
        yield from _own_tensors(prefix, record)


def _own_tensors(prefix: str, record: Record) -> Iterator[tuple[str, StoredTensor]]:
    for kind in ("_parameters", "_buffers"):
        members = record.state.get(kind, {})
        for name, value in members.items() if isinstance(members, dict) else ():
            if isinstance(value, StoredTensor):
                yield f"{prefix}.{name}".lstrip("."), value
