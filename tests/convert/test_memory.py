"""Conversions hold one tensor at a time."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamoe.convert.exported import as_type, write_export
from megamoe.convert.model_tensors import model_tensors
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.tensors import LazyTensor
from megamoe.convert.torch_writer import write_torch_file
from tests.checkpoint.small import model_of
from tests.convert.test_neutral import STATE

CONFIG, _ = model_of()


class Source:
    """Tensors that notice whether an earlier one is still held when the next is asked for."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.UntypedStorage]] = []
        self.most_held = 0

    def tensors(self) -> list[LazyTensor]:
        return [
            LazyTensor(kind, name, shape, "float32", self.loader(shape))
            for name, (kind, shape, _) in model_tensors(CONFIG, 10**6).items()
        ]

    def loader(self, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            self.most_held = max(self.most_held, sum(ref() is not None for ref in self.given))
            values = torch.zeros(shape)
            self.given.append(weakref.ref(values.untyped_storage()))
            return values

        return load


WRITERS: dict[str, Callable[[Path, list[LazyTensor]], None]] = {
    "neutral": lambda path, tensors: write_neutral(path, tensors, CONFIG, STATE),
    "torch file": lambda path, tensors: write_torch_file(path, {tensor.name: tensor for tensor in tensors}),
    "export": lambda path, tensors: write_export(path, tensors, CONFIG, STATE, shard_size=10**4),
    "cast export": lambda path, tensors: write_export(
        path, as_type(tensors, "bfloat16"), CONFIG, STATE, shard_size=10**9
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_tensor_is_held_while_the_next_is_loaded(tmp_path: Path, writer: str) -> None:
    source = Source()
    WRITERS[writer](tmp_path / "out", source.tensors())
    assert len(source.given) == len(source.tensors())
    assert source.most_held == 0
