"""The published data pipelines as recorded in tests/goldens/data."""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "goldens" / "data"


def read(corpus: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of tokens.npz and the settings and vocabulary of corpus.json."""
    with np.load(FOLDER / corpus / "tokens.npz") as arrays:
        tokens = dict(arrays)
    return tokens, json.loads((FOLDER / corpus / "corpus.json").read_text(encoding="utf-8"))


def content(corpus: str, name: str) -> bytes:
    return (FOLDER / corpus / name).read_bytes()
