"""tools/convert_checkpoint.py as a function."""

import runpy
from pathlib import Path
from typing import Any

_TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"))
COMMANDS: dict[str, str] = _TOOL["COMMANDS"]


def run_tool(*arguments: Any) -> int:
    """Its exit code."""
    return _TOOL["main"]([str(argument) for argument in arguments])


def convert(*arguments: Any) -> None:
    """Run it; it must succeed."""
    assert run_tool(*arguments) == 0
