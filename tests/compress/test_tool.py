"""tools/compress_checkpoint.py on a small trained run, and megamoe evaluate on what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from megamoe.cli import main as megamoe
from tools import inspect_checkpoint
from tools.compress_checkpoint import main


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_report_tells_bytes_losses_memory_and_figures(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_json(
        capsys, trained, tmp_path / "out", "--method", "resmoe", "--residual", "svd", "--keep", 0.5, "--score"
    )
    n_bytes, folder = report["bytes"], tmp_path / "out"
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert n_bytes["after"]["model"] <= on_disk < n_bytes["after"]["model"] + 10_000
    assert n_bytes["after"]["experts"] < n_bytes["before"]["experts"] < n_bytes["before"]["model"]
    resident = report["resident_bytes"]
    assert resident["restore"] == n_bytes["before"]["model"]
    assert resident["factored"] == resident["on_the_fly"] == n_bytes["after"]["model"]
    assert all(0 < loss["lost"] < loss["residual"] < 1 for loss in report["layers"].values())
    before, after = report["scores"]["before"], report["scores"]["after"]
    assert before["split"] == "valid" and before["bpc_by_k"].keys() == after["bpc_by_k"].keys() == {
        "1",
        "2",
        "4",
    }

    for mode in resident:
        assert megamoe(["evaluate", str(folder), "--split", "valid", "--experts", mode, "--json"]) == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored["bpc_by_k"] == pytest.approx(after["bpc_by_k"], rel=1e-5)


def test_tables_are_printed_for_people(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trained, tmp_path / "out", "--method", "merge", "--score", "--max-tokens", 500) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("merge, keep 0.25", "experts on disk", "on_the_fly", "lost", "bpc")
    )


def test_the_curve_has_every_method_at_every_size(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "plots" / "curve.png"
    curve = as_json(capsys, trained, "--curve", image, "--keep", "0.3,1", "--max-tokens", 500)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert not curve["left_out"]
    points = {(point["method"], point["keep"]): point for point in curve["points"]}
    names = {"resmoe (prune)", "resmoe (svd)", "svd", "prune", "merge", "drop"}
    assert points.keys() == {(name, keep) for name in names for keep in (0.3, 1)}
    for name in names:
        assert points[name, 1]["figure"] == pytest.approx(curve["figure"], rel=1e-5)
        assert points[name, 0.3]["bytes"]["experts"] < curve["bytes"]["experts"]
    assert points["drop", 0.3]["top_k"] == 1 and points["merge", 0.3]["top_k"] == curve["top_k"] == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--method svd --keep 1.5", "--keep = 1.5: give a fraction above 0, at most 1"),
        ("--method svd --keep 0.1,0.2", "--keep = 0.1,0.2: several are for --curve; give one"),
        ("--method svd --residual prune", "--residual: is for --method resmoe; leave it out"),
        ("--method resmoe --by frequency", "--by: is for --method drop; leave it out"),
        ("--method resmoe --starts 0", "--starts = 0: give 1 or more"),
        ("--method merge --max-tokens -1", "--max-tokens = -1: give 0 or more"),
        ("--curve curve.png", "--curve = 'curve.png': scores anyway and keeps no checkpoint; leave OUT out"),
        ("--method merge --set model.n_layers=1", "model: belongs to the trained model"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, problem: str
) -> None:
    assert run(trained, tmp_path / "out", *options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {problem}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert run(trained, tmp_path / "out", "--method", "svd") == 2
    assert "exists; remove it or choose another name" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_other_tools_know_a_compressed_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(trained, out, "--method", "prune") == 0
    assert inspect_checkpoint.main([str(out), "--verify"]) == 0
    assert "compressed checkpoint" in capsys.readouterr().out
    assert run(out, tmp_path / "again", "--method", "svd") == 2
    assert "restore it with tools/convert_checkpoint.py from-compressed" in capsys.readouterr().err
    assert megamoe(["evaluate", str(out), "--experts", "factored"]) == 2
    assert "is for residuals of low rank, and these are pruned; give on_the_fly" in capsys.readouterr().err
    assert megamoe(["evaluate", str(trained), "--experts", "on_the_fly"]) == 2
    assert "only compressed checkpoints have the choice" in capsys.readouterr().err
    assert megamoe(["evaluate", str(out), "--expert-budget", "50%"]) == 2
    assert "budget = 50%: compressed experts cannot be read one by one" in capsys.readouterr().err
    assert megamoe(["evaluate", str(out), "--experts", "on_the_fly", "--expert-budget", "50%"]) == 2
    assert "not allowed with argument --experts" in capsys.readouterr().err
