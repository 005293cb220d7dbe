"""What every benchmark does with its result: JSON for machines, Markdown for people."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare --output."""
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json and NAME.md")


def keep(result: Mapping[str, Any], report: str, output: Path | None) -> None:
    """Write the figures and the report about them, if --output asks for it."""
    if output:
        output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(report, encoding="utf-8")
