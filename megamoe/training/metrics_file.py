"""metrics.jsonl: one JSON object per line, each with the ``step`` it belongs to. Needs no torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_line(values: Mapping[str, Any]) -> str:
    """One line of the file; numbers that JSON cannot say (NaN, infinity) become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(plain) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, in order; a torn last line of a killed run is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def drop_after(path: Path, step: int, last_step: int) -> None:
    """Remove what a run to `last_step`, resumed at `step`, writes again, and a torn last line.

    That is the lines of later steps, and the test figures of the last, which has been done if the run is
    finished. The file may not exist.
    """
    if not path.exists():
        return

    def is_written_again(line: Mapping[str, Any]) -> bool:
        tested = any(name.startswith("test/") for name in line)
        return line["step"] > step or (tested and line["step"] == last_step)

    kept = [line for line in read_metrics(path) if not is_written_again(line)]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(map(to_line, kept)), encoding="utf-8")
    temporary.replace(path)
