import subprocess
import sys
from pathlib import Path

import pytest

import megamoe.convert.cast
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
