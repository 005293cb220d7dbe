"""Images of a comparison: figures by policy and k, learning curves, routing and cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from megamoe.compare.report import ranked, seeds_of
from megamoe.compare.summary import figure_at
from megamoe.plot_style import ACCENT, MUTED, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values: TypeAlias = dict[str, Any]
Colors: TypeAlias = dict[str, Any]


def plot_comparison(summary: Values, folder: Path) -> list[Path]:
    """Draw figures.png and routing.png into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    order = [entry for entry in ranked(summary) if entry["figures"]]
    shades = colormaps["turbo"](np.linspace(0.05, 0.95, len(order)))
    colors: Colors = {entry["label"]: shade for entry, shade in zip(order, shades, strict=True)}
    height = max(4.0, 0.36 * len(order) + 1.6)
    images = []
    for name, panels in (("figures", (_seeds, _by_k, _curves)), ("routing", (_load, _agreement, _cost))):
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(1, 3, figsize=(16, height), layout="constrained")
            terms = f"{seeds_of(summary)}, equal {summary['budget']}"
            figure.suptitle(
                f"Routing policies on {summary['corpus']}, {terms}",
                fontsize=13,
                fontweight="bold",
                x=0.01,
                ha="left",
            )
            for draw, panel in zip(panels, axes, strict=True):
                draw(panel, summary, order, colors)
            images.append(folder / f"{name}.png")
            figure.savefig(images[-1], dpi=140)
            pyplot.close(figure)
    return images


def _seeds(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    """Every seed as a dot, the mean as a bar, best on top."""
    axes.set_title(f"Test {summary['metric']} at k = {summary['top_k']}, every seed")
    for place, entry in enumerate(reversed(order)):
        _, found = figure_at(entry, summary["top_k"])  # type: ignore[misc]
        axes.plot(found["seeds"], [place] * len(found["seeds"]), "o", color=colors[entry["label"]], alpha=0.6)
        axes.plot(
            [found["mean"]] * 2, [place - 0.3, place + 0.3], color=colors[entry["label"]], linewidth=2.5
        )
    _policies_on_y(axes, order)


def _by_k(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    axes.set_title(f"Test {summary['metric']} by number of active experts")
    ks = sorted({int(k) for entry in order for k in entry["figures"]})
    for entry in order:
        found = sorted((ks.index(int(k)), value) for k, value in entry["figures"].items())
        axes.errorbar(
            [place for place, _ in found], [value["mean"] for _, value in found],
            yerr=[value["deviation"] or 0 for _, value in found], color=colors[entry["label"]],
            label=entry["label"], marker="o", markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_xlabel("active experts k")
    # Policies asked for a k they never met can be far off; the others shall be told apart.
    means = [value["mean"] for entry in order for value in entry["figures"].values()]
    axes.set_ylim(min(means) * 0.99, float(np.percentile(means, 85)) * 1.03)
    axes.legend(ncols=2, fontsize=7)


def _curves(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    """Mean over seeds of the validation figure at the run's k."""
    axes.set_title(f"Validation {summary['metric']} at k = {summary['top_k']}, mean over seeds")
    axes.set_xlabel("tokens (million)")
    for entry in order:
        curves = [run["validation"] for run in entry["runs"] if not run["diverged"]]
        k = str(summary["top_k"]) if all(str(summary["top_k"]) in curve for curve in curves) else None
        chosen = [curve[k or max(curve, key=int)] for curve in curves if curve]
        if not chosen:
            continue
        points = np.array(chosen).mean(0)
        tokens = points[:, 0] * entry["tokens"] / entry["steps"] / 1e6
        axes.plot(tokens, points[:, 1], color=colors[entry["label"]], label=entry["label"], linewidth=1.3)
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]
    if lines:
        late = np.concatenate([line[len(line) // 4 :] for line in lines])
        axes.set_ylim(late.min() * 0.99, late.max() * 1.01)


def _load(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    axes.set_title("Load of the busiest expert over the mean")
    _bars(axes, order, [entry["routing"]["max_over_mean"] for entry in order], colors)
    axes.axvline(1, color=MUTED, linestyle="--", linewidth=1)


def _agreement(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    axes.set_title("Neighbouring layers with the same top expert")
    _bars(axes, order, [entry["routing"]["agreement"] for entry in order], colors)
    axes.axvline(1 / summary["n_experts"], color=MUTED, linestyle="--", linewidth=1)


def _cost(axes: "Axes", summary: Values, order: list[Values], colors: Colors) -> None:
    axes.set_title(f"Expert FLOPs of a run against test {summary['metric']}")
    for entry in order:
        _, found = figure_at(entry, summary["top_k"])  # type: ignore[misc]
        if entry["expert_teraflops"] is None:
            continue
        axes.plot(entry["expert_teraflops"], found["mean"], "o", color=colors[entry["label"]])
        axes.annotate(entry["label"], (entry["expert_teraflops"], found["mean"]), fontsize=7.5,
                      textcoords="offset points", xytext=(5, 3), color=ACCENT)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("expert TFLOPs")
    axes.margins(x=0.25)


def _bars(axes: "Axes", order: list[Values], values: list[float | None], colors: Colors) -> None:
    numbers = [0.0 if value is None else value for value in reversed(values)]
    axes.barh(range(len(order)), numbers, color=[colors[entry["label"]] for entry in reversed(order)])
    _policies_on_y(axes, order)


def _policies_on_y(axes: "Axes", order: list[Values]) -> None:
    axes.set_yticks(range(len(order)), [entry["label"] for entry in reversed(order)])
    axes.set_ylim(-0.6, len(order) - 0.4)
