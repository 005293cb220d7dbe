"""Images of an analysis: neurons against chance, experts, settling, disturbance."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.analyze.report import Values
from megamoe.plot_style import ACCENT, MUTED, STYLE, VALID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("experts", "random experts", "neurons", "random neurons")
_BESIDE: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}


def plot_analysis(found: Values, folder: Path) -> list[Path]:
    """Draw neurons.png, experts.png, and where there is something to show settling.png and disturbed.png."""
    import matplotlib

    matplotlib.use("Agg")
    n_functions, n_layers = len(found["functions"]), len(found["layers"])
    height = max(3.4, 0.34 * n_functions + 1.8)
    images = [
        _image(folder / "neurons.png", found, [_best, _information], height),
        _image(folder / "experts.png", found, [_gathering(i) for i in range(n_layers)], height),
    ]
    if len(found["checkpoints"]) > 1:
        images.append(_image(folder / "settling.png", found, [_over_training, _stability], 4.2))
    if found["perturbation"]:
        panels = [_effects("functional experts masked", KINDS[:2]), _effects("noise on neurons", KINDS[2:])]
        images.append(_image(folder / "disturbed.png", found, panels, height))
    return images


def _image(path: Path, found: Values, panels: Sequence[Any], height: float) -> Path:
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(6.2 * len(panels), height), layout="constrained", squeeze=False
        )
        last = found["checkpoints"][-1]
        figure.suptitle(f"{last['name']}, step {last['step']:,}", fontweight="bold", x=0.01, ha="left")
        for draw, panel in zip(panels, axes[0], strict=True):
            draw(panel, found)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)
    return path


def _best(axes: "Axes", found: Values) -> None:
    axes.set_title("Predictivity of the best neuron, by layer")
    _against_chance(axes, found, "best")


def _information(axes: "Axes", found: Values) -> None:
    axes.set_title("Bits that a token's expert tells of the label")
    _against_chance(axes, found, "information")


def _against_chance(axes: "Axes", found: Values, name: str) -> None:
    findings = found["checkpoints"][-1]["findings"]
    shades = _shades(len(found["layers"]))
    for place, function in enumerate(found["functions"]):
        for f, shade in zip(findings[function], shades, strict=True):
            axes.plot(f[name], place, "o", color=shade)
            axes.plot(f[f"{name}_chance"], place, "|", color=shade, markersize=12)
    for layer, shade in zip(found["layers"], shades, strict=True):
        axes.plot([], [], "o", color=shade, label=f"layer {layer}")
    axes.plot([], [], "|", color=MUTED, markersize=12, linestyle="none", label="chance")
    axes.legend()
    _functions_on_y(axes, found)


def _gathering(i: int) -> Any:
    """A panel of mixture layer i."""

    def draw(axes: "Axes", found: Values) -> None:
        findings = [found["checkpoints"][-1]["findings"][function][i] for function in found["functions"]]
        axes.set_title(f"Layer {found['layers'][i]}: a function's neurons by expert, dots: functional")
        shares = np.array([f["counts"] for f in findings]) / findings[0]["n_top"]
        picture = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=max(0.01, shares.max()))
        axes.figure.colorbar(picture, ax=axes, format="{x:.0%}")
        for place, f in enumerate(findings):
            axes.plot(f["functional"], [place] * len(f["functional"]), "o", color=VALID[0], markersize=4)
        axes.set_xlabel("expert")
        axes.grid(False)
        _functions_on_y(axes, found)

    return draw


def _over_training(axes: "Axes", found: Values) -> None:
    axes.set_title("Best neuron, mean over layers; dashed: chance")
    shades = _shades(len(found["functions"]))
    for function, shade in zip(found["functions"], shades, strict=True):
        findings = [checkpoint["findings"][function] for checkpoint in found["checkpoints"]]
        for name, line in (("best", "-"), ("best_chance", "--")):
            values = [fmean(f[name] for f in of_layers) for of_layers in findings]
            axes.plot(_steps(found), values, line, color=shade, linewidth=1.8 if line == "-" else 0.9,
                      label=function if line == "-" else None)  # fmt: skip
    axes.set_xlabel("step")
    axes.legend(**_BESIDE)


def _stability(axes: "Axes", found: Values) -> None:
    axes.set_title("Rank correlation of scores with the last checkpoint")
    for kind, color in (("neurons", ACCENT), ("experts", VALID[0]), ("random", MUTED)):
        values = [row[-1] for row in found["stability"][kind]]
        label = "random groups" if kind == "random" else kind
        axes.plot(_steps(found), np.array(values, float), color=color, marker="o", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.legend()


def _effects(title: str, kinds: Sequence[str]) -> Any:
    """A panel of the rise of bits per token under a kind of disturbance, against its random form."""

    def draw(axes: "Axes", found: Values) -> None:
        axes.set_title(f"Rise of bits per token: {title}")
        bars = [(kind, text) for kind in kinds for text in ("own", "others")]
        for i, (kind, text) in enumerate(bars):
            look: Any = {"color": ACCENT if kind == kinds[0] else MUTED, "alpha": 1 if text == "own" else 0.4}
            axes.barh(0, 0, **look, label=f"{kind}: {text}")
            for place, function in enumerate(found["functions"]):
                values = [effect[text] for effect in found["perturbation"][function].get(kind, [])]
                y = place - 0.3 + 0.2 * i
                if values:
                    axes.barh(y, fmean(values), 0.18, **look)
                    axes.plot([min(values), max(values)], [y, y], color="black", linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.legend(**_BESIDE)
        _functions_on_y(axes, found)

    return draw


def _functions_on_y(axes: "Axes", found: Values) -> None:
    axes.set_yticks(range(len(found["functions"])), found["functions"])
    axes.set_ylim(len(found["functions"]) - 0.4, -0.6)


def _steps(found: Values) -> list[int]:
    return [checkpoint["step"] for checkpoint in found["checkpoints"]]


def _shades(n: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.05, 0.85, n))
