from pathlib import Path

import pytest
import torch

from megamoe.convert.tensors import lazy
from megamoe.convert.torch_writer import NewTensor, write_torch_file
from megamoe.errors import CheckpointError


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    tied = lazy("weight", "tied", values)
    content = {
        "whole": NewTensor((2, 3), "bfloat16", lambda: [values[0], values[1]]),
        "number": NewTensor((), "float32", lambda: [torch.tensor(7.0)]),
        "empty": NewTensor((0, 3), "int64", list),
        "tied": [tied, tied],
        "plain": {"name": "x", "sizes": (1, 2)},
    }
    done: list[int] = []
    write_torch_file(tmp_path / "file.pt", content, progress=done.append)
    found = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)
    assert torch.equal(found["whole"], values.bfloat16()) and found["whole"].data_ptr() % 64 == 0
    assert torch.equal(found["number"], torch.tensor(7.0))
    assert found["empty"].shape == (0, 3) and found["empty"].dtype == torch.int64
    assert torch.equal(found["tied"][0], values)
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()
    assert found["plain"] == content["plain"]
    assert sum(done) == 6 * 2 + 4 + 6 * 4


def test_parts_that_are_not_the_whole_are_refused(tmp_path: Path) -> None:
    short = NewTensor((3,), "float32", lambda: [torch.zeros(2)])
    with pytest.raises(CheckpointError, match="2 numbers were read for a tensor of 3"):
        write_torch_file(tmp_path / "file.pt", short)
