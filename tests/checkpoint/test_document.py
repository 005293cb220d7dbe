"""What docs/checkpoints.md tells other programs."""

import json
import re
from pathlib import Path

import torch

from megamoe.checkpoint.dtypes import DTYPES
from megamoe.checkpoint.format import FORMAT, KINDS, VERSION
from tests.checkpoint.small import model_of, write_model

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def block(language, containing):
    [found] = [
        text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if containing in text
    ]
    return found


def test_its_ten_lines_read_a_checkpoint(tmp_path, monkeypatch):
    _, model = model_of()
    write_model(tmp_path / "runs" / "demo" / "best", *model_of())
    monkeypatch.chdir(tmp_path)
    code = block("python", "safe_open")
    assert len([line for line in code.splitlines() if line]) <= 10
    names = {}
    exec(code, names)
    expected = dict(model.named_parameters())
    assert names["weights"].keys() == expected.keys()
    assert all(torch.equal(names["weights"][name], expected[name]) for name in expected)


def test_its_manifest_has_the_fields_of_a_real_one(tmp_path):
    folder = write_model(tmp_path / "best", *model_of())
    real = json.loads((folder / "manifest.json").read_text())
    shown = json.loads(block("json", "megamoe-checkpoint"))
    assert shown.keys() == real.keys()
    assert (shown["format"], shown["version"]) == (FORMAT, VERSION)
    name = "layers.1.moe.experts.w_in"
    for field in ("shape", "dtype"):
        assert shown["tensors"]["weight"][name][field] == real["tensors"]["weight"][name][field]
    keys = [key for _, key, _, _ in shown["tensors"]["weight"][name]["pieces"]]
    assert real["tensors"]["weight"][name]["pieces"][0][1] == keys[0]


def test_it_names_every_kind_and_type():
    assert all(f"`{kind}`" in TEXT for kind in KINDS)
    assert f"one of {', '.join(DTYPES)}." in TEXT
