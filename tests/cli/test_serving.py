"""``megamoe predict-experts``, ``serve-bench`` and ``generate --expert-budget`` as a user calls them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamoe.cli import main
from megamoe.config import from_dict
from megamoe.config.load import merge
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.models.transformer_xl import TransformerXL
from tests.checkpoint.runs import RUN
from tests.checkpoint.small import write_model
from tests.cli.conftest import Done
from tests.cli.test_cli import refusal


def write_served(folder: Path, project: Path, **updates: Any) -> Path:
    """A model of random weights, as if it had been trained on the text of `project`."""
    data = {"dataset": "text", "path": str(project / "data")}
    config = from_dict(merge(RUN, merge({"data": data, "moe": {"layers": "all"}}, updates)))
    config = replace(config, model=replace(config.model, vocab_size=256))
    model = TransformerXL(config.model, config.moe, seed=config.training.seed)
    return write_model(folder, config, model, tokenizer=ByteTokenizer().to_dict())


@pytest.fixture(scope="module")
def served(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("run") / "best", project)


@pytest.fixture(scope="module")
def predictor(served: Path) -> Path:
    folder = served.parent / "predictor"
    assert main(["predict-experts", str(served), str(folder), "--epochs", "3", "--width", "16"]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)


def test_a_predictor_is_a_folder(predictor):
    assert sorted(path.name for path in predictor.iterdir()) == [
        "predictor.json", "predictor.safetensors", "routings"
    ]  # fmt: skip
    figures = json.loads((predictor / "predictor.json").read_text())["figures"]
    assert figures["top_k"] == 2
    assert all(0 < layer["2"] <= layer["3"] <= layer["4"] == 1 for layer in figures["recalls"])
    assert [path.name for path in predictor.parent.iterdir() if path.name.startswith(".")] == []


def test_texts_are_the_same_from_few_slots(served, predictor, capsys):
    words = ("generate", served, "--prompt", "The", "--prompt", "a", "--max-new-tokens", "12", "--json")
    expected = [json.loads(line)["text"] for line in run(capsys, *words).output.splitlines()]
    for options in (("--expert-budget", "25%"), ("--expert-budget", "1MiB", "--predictor", predictor)):
        lines = [json.loads(line) for line in run(capsys, *words, *options).output.splitlines()]
        assert [line["text"] for line in lines] == expected
        assert lines[0]["bytes_moved"] > 0
        assert 0 <= lines[0]["experts_in_slots"] < 1
    done = run(capsys, *words[:-1], "--expert-budget", "25%")
    assert ", k = 2 of 4, 1 in memory, " in done.errors


def test_figures_are_the_same_from_few_slots(served, capsys):
    words = ("evaluate", served, "evaluation.batch_size=4", "evaluation.top_ks=1,3", "--json")
    expected = run(capsys, *words)
    assert expected.code == 0, expected.errors
    assert run(capsys, *words, "--expert-budget", "25%").output == expected.output


def test_serving_is_measured(served, predictor, capsys, tmp_path):
    options = (
        "--predictor",
        predictor,
        "--budget",
        "50%",
        "--tokens",
        "30",
        "--output",
        tmp_path / "serving",
    )
    done = run(capsys, "serve-bench", served, *options)
    assert done.code == 0, done.errors
    result = json.loads((tmp_path / "serving.json").read_text())
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == ["resident", "ondemand", "hint", "oracle", "replace"]
    assert [row["same"] for row in rows.values()] == [True, True, True, True, False]
    for mode, row in rows.items():
        assert row["peak_bytes"] >= row["floor_bytes"] > 0
        assert (mode == "resident") == (row["traffic"] == {})
        if row["traffic"]:
            assert 2 * row["slot_bytes"] == rows["resident"]["slot_bytes"]
            traffic = row["traffic"]
            assert traffic["n_bytes"] * 2 * 2 == traffic["loads"] * row["slot_bytes"]
    on_demand, policies = rows["ondemand"]["traffic"], result["policies"][0]
    assert on_demand["misses"] == on_demand["loads"] == policies["lru"] >= policies["belady"]
    assert on_demand["hits"] + on_demand["misses"] == policies["needed"]
    assert (tmp_path / "serving.md").read_text() == f"# Serving\n\n{done.output[:-1]}"
    assert (tmp_path / "serving.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve-bench", "{served}", "--budget", "1B"), "budget = 1B: no room for one expert in each of 2"),
        (("serve-bench", "{served}", "--budget", "x"), "budget = 'x': give bytes, as 64MiB, or a share"),
        (("serve-bench", "{served}", "--tokens", "1"), "n_tokens = 1: give a number from 2 on"),
        (("serve-bench", "{served}", "--output", "none/x"), "--output = 'none/x': there is no such folder"),
        (("serve-bench", "{other}", "--predictor", "{predictor}"), "predictor '"),
        (("serve-bench", "{served}", "model.n_layers=3"), "model: belongs to the trained model"),
        (("generate", "{served}", "--prompt", "a", "--expert-budget", "1%"), "budget = 1%: no room for one"),
        (("evaluate", "{served}", "--expert-budget", "1%"), "budget = 1%: no room for one expert"),
        (("generate", "{served}", "--prompt", "a", "--predictor", "x"), "predictor = x: loads nothing ahead"),
        (("predict-experts", "{served}", "{predictor}"), "output = '"),
        (("predict-experts", "{served}", "{new}", "--tokens", "0"), "tokens = 0: give a number above 0"),
        (("predict-experts", "{served}", "{new}", "--tokens", "40"), "tokens = 40: fewer than two segments"),
        (("predict-experts", "{none}", "{new}"), "checkpoint '"),
        (("predict-experts", "{served}", "/proc/none/new"), "output = '/proc/none/new': cannot be written"),
        (("predict-experts", "{dense}", "{new}"), "moe: this model has no experts to predict"),
    ],
)  # fmt: skip
def test_refusals(arguments, message, served, predictor, project, capsys, tmp_path):
    places = {"served": served, "predictor": predictor, "new": tmp_path / "new", "none": tmp_path / "none"}
    if "{other}" in arguments:
        places["other"] = write_served(tmp_path / "best", project, training={"seed": 2})
    if "{dense}" in arguments:
        places["dense"] = write_served(tmp_path / "best", project, moe={"layers": "none"})
    done = run(capsys, *(argument.format(**places) for argument in arguments))
    assert refusal(done).startswith(message)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / ".new.tmp").exists()
