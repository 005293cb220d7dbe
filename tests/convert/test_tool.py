import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megamoe.convert.cast
from megamoe.checkpoint.format import MOMENTS, shard_file
from megamoe.convert.neutral_writer import new_folder
from megamoe.errors import CheckpointError
from megamoe.parallel.placement import saved_buffers
from tests.checkpoint.small import model_of, write_model, write_small
from tests.convert.tool import COMMANDS, run_tool

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "converting.md").read_text()


def test_help_names_every_command_without_importing_torch() -> None:
    code = f"""
import runpy, sys
sys.argv = ["convert_checkpoint.py", "--help"]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_tool(name, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"convert_checkpoint.py {name} " in text.partition("examples:")[2]
    assert f"`{name}`" in DOCUMENT


def test_a_missing_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("export", tmp_path / "none", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: checkpoint ") and error.count("\n") == 1


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(megamoe.convert.cast, "run", interrupt)
    assert run_tool("cast", "a", "b", "--dtype", "bf16") == 130
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["export"], ["to-reference"], ["to-deepspeed"], ["average"], ["merge"]], ids=str
)
def test_a_damaged_checkpoint_is_never_converted(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "a", *model_of())
    shard = folder / shard_file(1, 2)
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1
    shard.write_bytes(content)
    inputs = [folder, folder] if command == ["average"] else [folder]
    assert run_tool(*command, *inputs, tmp_path / "out") == 2
    assert "sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "to-reference", "to-deepspeed"])
@pytest.mark.parametrize("missing", ["layers.1.moe.router.hypernet_w_in", "embedding.weights.0"])
def test_tensors_of_another_model_are_never_converted(
    tmp_path: Path, command: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = model_of()
    tensors = {("weight", name): parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    kept = {key: values for key, values in tensors.items() if key[1] != missing}
    write_small(tmp_path / "a", kept, config=config)
    assert run_tool(command, tmp_path / "a", tmp_path / "out") == 2
    assert f"{missing}: missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["to-deepspeed", "--precision", "fp16"], ["export", "--dtype", "fp16"]])
def test_numbers_beyond_a_type_are_refused(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = model_of()
    with torch.no_grad():
        model.layers[1].moe.experts.w_in[0, 0, 0] = 1e5  # type: ignore[index, union-attr]
    write_model(tmp_path / "a", config, model)
    name, *options = command
    assert run_tool(name, tmp_path / "a", tmp_path / "out", *options) == 2
    assert "layers.1.moe.experts.w_in: holds numbers beyond the range of float16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_more_ranks_than_files_a_process_may_open(tmp_path: Path) -> None:
    config, model = model_of()
    tensors = {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    for name, parameter in model.named_parameters():
        tensors |= {(kind, name): parameter.detach().abs() for kind in ("weight", *MOMENTS)}
    write_small(tmp_path / "a", tensors, config=config)
    n_ranks = 120
    assert run_tool("to-deepspeed", tmp_path / "a", tmp_path / "native", "--world-size", n_ranks) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now_open + n_ranks - 20, hard))
    try:
        assert run_tool("from-deepspeed", tmp_path / "native", tmp_path / "back") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="cannot be written"), new_folder(out) as unfinished:
        (unfinished / "ours").touch()
        out.mkdir()
        (out / "precious").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_an_expert_parallel_size_without_states_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "a", *model_of())
    assert run_tool("to-deepspeed", tmp_path / "a", tmp_path / "native") == 0
    assert run_tool("from-deepspeed", tmp_path / "native", tmp_path / "out", "--ep-size", 7) == 2
    assert "--ep-size = 7: is that of optimizer states" in capsys.readouterr().err
