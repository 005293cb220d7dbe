"""What every benchmark does with its result: JSON for machines, Markdown for people."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch


def facts(module: str, device: torch.device) -> dict[str, Any]:
    """By which command, when and on what machine `module` measures, and by which clock."""
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{os.cpu_count()} shared CPU cores"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "clock": "wall time" if on_gpu else "CPU time",
        "date": date.today().isoformat(),
        "machine": f"{where} ({platform.machine()}), torch {torch.__version__} on"
        f" {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} at the start",
    }


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare --output."""
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json and NAME.md")


def keep(result: Mapping[str, Any], report: str, output: Path | None) -> None:
    """Write the figures and the report about them, if --output asks for it."""
    if output:
        output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(report, encoding="utf-8")
