import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.dtypes import dtype_name
from megamoe.checkpoint.format import MANIFEST
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.state import TrainingState
from megamoe.convert.neutral import open_neutral
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.tensors import LazyTensor, lazy, total_bytes
from megamoe.errors import CheckpointError
from tests.checkpoint.runs import run_config
from tests.checkpoint.small import some_tensors

STATE = TrainingState(step=7, best_metric=1.5)


def as_lazy() -> list[LazyTensor]:
    return [lazy(kind, name, values) for (kind, name), values in some_tensors().items()]


def test_a_checkpoint_is_written_read_and_written_again_without_a_change(tmp_path: Path) -> None:
    done: list[int] = []
    write_neutral(tmp_path / "a", as_lazy(), run_config(), STATE, progress=done.append)
    tensors, config, state = open_neutral(tmp_path / "a", verify=False)
    assert sum(done) == total_bytes(tensors)
    assert (config, state) == (run_config(), STATE)
    assert {(t.kind, t.name) for t in tensors} == set(some_tensors())
    for tensor in tensors:
        values = some_tensors()[tensor.kind, tensor.name]
        assert (tensor.shape, tensor.dtype) == (tuple(values.shape), dtype_name(values.dtype))
        assert torch.equal(tensor.checked(), values)
    write_neutral(tmp_path / "b", tensors, config, state)
    CheckpointReader(tmp_path / "b").verify()
    files = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in "ab"]
    assert files[0]["tensors"].keys() == files[1]["tensors"].keys()
    assert all(
        torch.equal(a.load(), b.load())
        for a, b in zip(tensors, open_neutral(tmp_path / "b", verify=False)[0], strict=True)
    )


def test_weights_are_stored_in_fp32_and_empty_tensors_without_pieces(tmp_path: Path) -> None:
    half = lazy("weight", "w", torch.tensor([1.5, 2.5]).bfloat16())
    write_neutral(tmp_path / "a", [half, lazy("buffer", "b", torch.zeros(0, 3))], run_config(), STATE)
    tensors = {tensor.name: tensor.load() for tensor in open_neutral(tmp_path / "a", verify=False)[0]}
    assert torch.equal(tensors["w"], torch.tensor([1.5, 2.5])) and tensors["b"].shape == (0, 3)


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists; remove it"):
        write_neutral(tmp_path, as_lazy(), run_config(), STATE)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_a_tensor_that_is_not_what_it_promised_leaves_nothing_behind(
    tmp_path: Path, wrong: torch.Tensor
) -> None:
    liar = replace(lazy("weight", "w", torch.zeros(2)), load=lambda: wrong)
    with pytest.raises(CheckpointError, match=r"weight w: .* expected"):
        write_neutral(tmp_path / "a", [*as_lazy(), liar], run_config(), STATE)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_neutral(tmp_path / "a", as_lazy(), run_config(), STATE, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_tensor_may_come_only_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_neutral(tmp_path / "a", [*as_lazy(), *as_lazy()], run_config(), STATE)
