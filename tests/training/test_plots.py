import math
from pathlib import Path

import pytest
from matplotlib import image as images

from megamoe.training.metrics_file import to_line
from megamoe.training.plots import plot_run


def write_metrics(path: Path, *, experts: bool, metric: str, tested: bool) -> None:
    lines = []
    for step in range(10, 201, 10):
        figure = 2 + 5 * math.exp(-step / 30)
        line = {
            "step": step,
            "tokens": step * 2048,
            f"train/{metric}": figure,
            "train/lr": 1e-3,
            "train/top_k": 2,
        }
        if experts:
            line |= {f"routing/layer_{layer}/max_over_mean": 1 + layer / step for layer in range(3)}
        lines.append(line)
        if step % 50 == 0:
            names = ("_k2", "_k4") if experts else ("",)
            lines.append({"step": step} | {f"valid/{metric}{name}": figure + 0.1 for name in names})
    if tested:
        names = ("_k1", "_k2", "_k4") if experts else ("",)
        lines.append({"step": 200} | {f"test/{metric}{name}": 2.2 for name in names})
    path.write_text("".join(map(to_line, lines)))


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize(("metric", "tested"), [("bpc", True), ("ppl", True), ("bpc", False)])
def test_an_image_with_curves(tmp_path, experts, metric, tested):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, experts=experts, metric=metric, tested=tested)
    path = plot_run(metrics, tmp_path / "plots/curves.png", title="toy on toy text", metric=metric)
    pixels = images.imread(path)
    assert pixels.shape == (1140, 1800, 4)
    for panel in (pixels[:570, :900], pixels[:570, 900:], pixels[570:, :900], pixels[570:, 900:]):
        assert (panel[..., :3].min(axis=-1) < 0.7).mean() > 0.001  # ink on every panel


def test_figures_that_are_not_finite_leave_the_panel_to_the_others(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "tokens": 8, "train/ppl": 9.0}, {"step": 1, "test/ppl_k1": math.inf}]
    metrics.write_text("".join(map(to_line, lines)))
    assert plot_run(metrics, tmp_path / "curves.png", title="toy", metric="ppl").stat().st_size > 1000
    metrics.write_text("".join(map(to_line, [*lines, {"step": 1, "test/ppl_k2": 5.0}])))
    assert plot_run(metrics, tmp_path / "curves.png", title="toy", metric="ppl").stat().st_size > 1000


def test_a_run_that_was_cut_before_its_first_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    assert plot_run(metrics, tmp_path / "curves.png", title="toy", metric="bpc").stat().st_size > 1000
