from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.convert.neutral import open_neutral
from megamoe.parallel.placement import saved_buffers
from tests.checkpoint.small import model_of, write_model, write_small
from tests.convert.tool import convert, run_tool

SEEDS = (1, 2, 3)


def write_runs(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Three checkpoints of one run: buffers are equal, weights are not. The last has moments too."""
    config, model = model_of()
    states = []
    for seed in SEEDS:
        for parameter in model.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
        write_model(folder / str(seed), config, model, step=seed)
        states.append({name: values.clone() for name, values in model.state_dict().items()})
    return states


def test_mean_of_weights(tmp_path: Path) -> None:
    states = write_runs(tmp_path)
    convert("average", *(tmp_path / str(seed) for seed in SEEDS), tmp_path / "out")
    tensors, _, state = open_neutral(tmp_path / "out")
    assert state.step == 3
    assert {tensor.name for tensor in tensors} == set(states[0])
    for tensor in tensors:
        values = torch.stack([state[tensor.name] for state in states])
        expected = values.double().mean(dim=0).float() if tensor.kind == "weight" else values[0]
        torch.testing.assert_close(tensor.load(), expected, rtol=0, atol=5e-7)


def test_moments_and_memory_are_left_out(tmp_path: Path) -> None:
    config, model = model_of()
    tensors = {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {(kind, name): parameter.detach() for kind in ("weight", *MOMENTS)}
    tensors["memory", "layers.0"] = torch.zeros(2, 3, 16)
    write_small(tmp_path / "a", tensors, config=config, step=5)
    convert("average", tmp_path / "a", tmp_path / "a", tmp_path / "out")
    assert {tensor.kind for tensor in open_neutral(tmp_path / "out")[0]} == {"weight", "buffer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_model": 18}}, "model.d_model = 16: checkpoint"),
        ({"moe": {"router": {"hyper_size": 9}}}, "layers.1.moe.router.hypernet_b_in: float32 [9] in"),
        ({"training": {"seed": 5}}, "training.seed: 5 in"),
    ],
)
def test_refuses_another_model_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    write_model(tmp_path / "b", *model_of(**changes))
    write_model(tmp_path / "a", *model_of())
    assert run_tool("average", tmp_path / "b", tmp_path / "a", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "b") in error
    assert not (tmp_path / "out").exists()


def test_refuses_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("a", "bytes"), ("b", "words")):
        write_model(tmp_path / name, *model_of(), tokenizer={"kind": kind})
    assert run_tool("average", tmp_path / "a", tmp_path / "b", tmp_path / "out") == 2
    assert "tokenizer: differs in" in capsys.readouterr().err


def test_one_checkpoint_is_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("average", tmp_path, tmp_path / "out") == 2
    assert "give two checkpoints or more" in capsys.readouterr().err
