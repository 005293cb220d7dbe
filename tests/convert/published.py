"""Checkpoints of the published program, converted."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.convert.tool import convert
from tests.models.goldens import GOLDENS

FOLDER = GOLDENS / "checkpoint"
NAMES = ("hyperrouter_tiny", "smoe_dropout_tiny", "dense_tiny")


@cache
def facts(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "info.json").read_text())


@cache
def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / name / "reference.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def convert_golden(name: str, output: Path, model: str = "model.pt") -> Path:
    """The neutral checkpoint of a golden one, with its moments and its vocabulary."""
    vocab = output.with_name(f"{output.name}.symbols.json")
    vocab.write_text(json.dumps(facts(name)["vocab"]))
    folder = FOLDER / name
    convert(
        "from-reference", folder / model, output, "--optimizer", folder / "optimizer.pt", "--vocab", vocab,
        "--set", "training.batch_size=3",
    )  # fmt: skip
    return output
