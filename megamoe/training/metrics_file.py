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


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps past `step`, and a torn last line, from a file that may not exist."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(map(to_line, kept)), encoding="utf-8")
    temporary.replace(path)
