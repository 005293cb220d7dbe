"""`megamoe plan` as it is typed."""

import json
from pathlib import Path

import pytest

from megamoe.cli import main

XL = ("plan", "--preset", "xl_enwik8", "--nodes", "8", "--gpus-per-node", "8", "--device", "h100")


def test_tables_and_reasons_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "memory.png"
    assert main([*XL, "--plot", str(image)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "1.08 B in experts",
        "memory of a rank",
        "all-to-all",
        "largest micro-batch",
        "1. moe.ep_size=",
        "node-hours",
    ):
        assert words in shown
    assert image.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, shown.splitlines()[:40])) <= 120


def test_json_has_the_same_and_overrides_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*XL, "--json", "moe.ep_size=16"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = found["chosen"]
    assert chosen["layout"]["ep_size"] == 16
    assert chosen["parameters"]["total"] == chosen["parameters"]["frozen"] + sum(
        chosen["parameters"][part] for part in ("shared", "experts")
    )
    assert chosen["memory"]["total"] < chosen["usable"]
    assert len(found["best"]) == 3
    assert found["best"][0]["why"]


def test_a_plan_that_does_not_fit_is_shown_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "xl_enwik8", "--device", "a100", "training.micro_batch_size=64",
                 "training.activation_checkpointing=false"]) == 2  # fmt: skip
    shown = capsys.readouterr()
    assert "does not fit" in shown.out
    assert shown.err.startswith("megamoe: error: memory: a rank needs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device = 'tpu': unknown"),
        (["--nodes", "0"], "--nodes = 0: give a number above 0"),
        (["--efficiency", "2"], "--efficiency = 2.0: give a share"),
        (["--scaling", "1,x"], "--scaling = '1,x': give numbers of nodes"),
        (["--plot", "nowhere/a.png"], "--plot = 'nowhere/a.png': there is no such folder"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--preset", "xl_enwik8", *words]) == 2
    assert message in capsys.readouterr().err


def test_scaling_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*XL, "--scaling", "8,16"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("weak") == 2
    assert shown.count("strong") == 2
