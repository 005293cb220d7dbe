"""One image of a run, drawn from its metrics.jsonl: losses, schedules, load balance, test figures by k."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.plot_style import ACCENT, MUTED, STYLE, TRAIN, VALID
from megamoe.training.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[Mapping[str, Any]]


def plot_run(metrics: Path, image: Path, *, title: str, metric: str, loss_metric: str = "") -> Path:
    """Draw the curves of a metrics file into a PNG.

    Args:
        metrics: a metrics.jsonl.
        image: where to write.
        title: name of the run and of its corpus.
        metric: of the test figures: "bpc", "ppl" or "accuracy".
        loss_metric: of the curves, "loss" for nats; empty: that of the test figures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        _losses(panels[0, 0], lines, loss_metric or metric)
        _test_figures(panels[0, 1], lines, metric)
        _schedules(panels[1, 0], lines)
        _load_balance(panels[1, 1], lines)
        image.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(image, dpi=150)
        pyplot.close(figure)
    return image


def _losses(axes: "Axes", lines: Lines, metric: str) -> None:
    steps, losses = _series(lines, f"train/{metric}")
    axes.set_title("Loss (nats)" if metric == "loss" else f"Loss ({metric})")
    axes.set_xlabel("step")
    if len(losses):
        axes.plot(steps, losses, color=TRAIN, label="train")
        # The first steps tower over the rest and would flatten it.
        shown = losses[max(0, len(losses) // 20) :]
        axes.set_ylim(top=float(shown.max()) + 0.08 * float(np.ptp(shown)) + 1e-6)
        _token_axis(axes, lines)
    for color, (k, name) in zip(VALID, _by_k(lines, f"valid/{metric}"), strict=False):
        axes.plot(*_series(lines, name), color=color, marker="o", markersize=4, label=f"validation{_at(k)}")
    if metric == "ppl":
        axes.set_yscale("log")
    _legend(axes)


def _token_axis(axes: "Axes", lines: Lines) -> None:
    """A second axis below the steps."""
    last = next(line for line in reversed(lines) if "tokens" in line and line["step"])
    per_step = last["tokens"] / last["step"]
    scale, unit = (1e9, "billion") if last["tokens"] >= 2e9 else (1e6, "million")
    # Functions of arrays, which the annotation of matplotlib does not foresee.
    there_and_back: Any = (lambda step: step * per_step / scale, lambda tokens: tokens * scale / per_step)
    below = axes.secondary_xaxis(-0.2, functions=there_and_back)
    below.set_xlabel(f"tokens ({unit})")


def _test_figures(axes: "Axes", lines: Lines, metric: str) -> None:
    axes.set_title(f"Test {metric} by number of active experts")
    # Figures that are not finite are null in the file.
    named = [(k, name) for k, name in _by_k(lines, f"test/{metric}") if len(_series(lines, name)[0])]
    if not named:
        _say(axes, "no finite test figures")
        return
    values = [float(_series(lines, name)[1][-1]) for _, name in named]
    places = range(len(named))
    axes.plot(places, values, color=ACCENT, marker="o", markersize=6)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.1f}" if metric == "ppl" else f"{value:.3f}", (place, value),
                      textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8.5)  # fmt: skip
    axes.set_xticks(list(places), [str(k) if k is not None else "no experts" for k, _ in named])
    axes.set_xlabel("active experts k")
    # At least two percent of the figure, so that noise does not look like a slope.
    middle, half = (max(values) + min(values)) / 2, max(np.ptp(values) * 0.7, 0.01 * max(values))
    axes.set_ylim(middle - half, middle + half)
    axes.margins(x=0.08)


def _schedules(axes: "Axes", lines: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Learning rate and active experts in training")
    axes.set_xlabel("step")
    axes.plot(*_series(lines, "train/lr"), color=ACCENT, label="learning rate")
    axes.set_ylabel("learning rate", color=ACCENT)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    steps, top_ks = _series(lines, "train/top_k")
    if len(top_ks):
        right = axes.twinx()
        right.step(steps, top_ks, where="post", color=VALID[0], label="active experts k")
        right.set_ylabel("active experts k", color=VALID[0])
        right.set_ylim(0, float(top_ks.max()) * 1.15)
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.grid(False)


def _load_balance(axes: "Axes", lines: Lines) -> None:
    from matplotlib import colormaps

    axes.set_title("Load of the busiest expert over the mean")
    axes.set_xlabel("step")
    pattern = re.compile(r"routing/layer_(\d+)/max_over_mean")
    layers = sorted({(int(m[1]), m[0]) for line in lines for name in line if (m := pattern.fullmatch(name))})
    if not layers:
        _say(axes, "no layer has experts")
        return
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(layers)))
    for shade, (layer, name) in zip(shades, layers, strict=True):
        axes.plot(*_series(lines, name), color=shade, label=f"layer {layer}")
    axes.axhline(1, color=MUTED, linestyle="--", linewidth=1, label="perfect balance")
    axes.set_ylim(bottom=0.9)
    _legend(axes, columns=1 + len(layers) // 5)


def _series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it is a number."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _by_k(lines: Lines, stem: str) -> list[tuple[int | None, str]]:
    """The metrics ``stem_k4`` as (4, name), rising; a model without experts has ``stem`` alone."""
    pattern = re.compile(re.escape(stem) + r"(?:_k(\d+))?")
    found = {
        m[0]: int(m[1]) if m[1] else None for line in lines for name in line if (m := pattern.fullmatch(name))
    }
    return sorted(((k, name) for name, k in found.items()), key=lambda item: item[0] or 0)


def _at(k: int | None) -> str:
    return "" if k is None else f", k = {k}"


def _legend(axes: "Axes", columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=columns)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
