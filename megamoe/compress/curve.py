"""All methods at several sizes: figures on held-out text against bytes, as numbers and as one picture."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megamoe.checkpoint.compressed import open_reader
from megamoe.compress.methods import compress
from megamoe.compress.report import Size, scores
from megamoe.compress.settings import METHODS, RESIDUALS, Settings
from megamoe.compress.source import Source
from megamoe.convert.neutral import tensors_of
from megamoe.errors import CheckpointError
from megamoe.plot_style import ACCENT, MUTED, STYLE, VALID

_COLORS = (ACCENT, "#5fa8d3", *VALID)


def measure_curve(source: Source, keeps: Sequence[float]) -> dict[str, Any]:
    """Compress a checkpoint by every method at every `keep`, and score the results at `moe.top_k`.

    The compressed checkpoints are written to the system's temporary folder, one at a time.

    Args:
        source: what to compress, and the text to score on.
        keeps: fractions to keep, each for every method.

    Returns:
        The figure before, and `points`, each with method, keep, bytes and figure. `left_out` says why a
        method is not for the checkpoint's policy.
    """
    scored = scores(source, source.path, _top_k(source.path))
    points, left_out = [], {}
    for settings in contenders():
        try:
            for keep in keeps:
                points.append(_point(source, replace(settings, keep=keep)))
        except CheckpointError as error:
            left_out[settings.name] = str(error)
    (top_k,) = scored.nats
    return {
        "checkpoint": str(source.path), "corpus": scored.corpus, "split": scored.split,
        "metric": scored.metric, "tokens": scored.tokens, "top_k": top_k,
        "n_experts": source.config.moe.n_experts, "d_expert": source.config.moe.d_expert,
        "figure": scored.figure(top_k), "bytes": asdict(Size.of(source.tensors)),
        "points": points, "left_out": left_out,
    }  # fmt: skip


def contenders() -> Iterator[Settings]:
    """Every method with every residual that it has."""
    for method in METHODS:
        for residual in RESIDUALS if method == "resmoe" else RESIDUALS[:1]:
            yield Settings(method=method, residual=residual)


def _point(source: Source, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "compressed"
        compress(source, settings, folder)
        scored = scores(source, folder, _top_k(folder))
        (top_k,) = scored.nats
        return {
            "method": settings.name, "keep": settings.keep, "top_k": top_k, "figure": scored.figure(top_k),
            "bytes": asdict(Size.of(tensors_of(open_reader(folder)))),
        }  # fmt: skip


def _top_k(checkpoint: Path) -> str:
    """As an override; fewer where fewer experts are left."""
    return f"evaluation.top_ks={open_reader(checkpoint).config.moe.top_k}"


def plot_curve(curve: dict[str, Any], image: Path) -> None:
    """Draw figures against the bytes of the experts into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8.4, 5.2), layout="constrained")
        names = list(dict.fromkeys(point["method"] for point in curve["points"]))
        for name, color in zip(names, _COLORS, strict=True):
            points = [point for point in curve["points"] if point["method"] == name]
            places = sorted((point["bytes"]["experts"] / 1e6, point["figure"]) for point in points)
            axes.plot(*zip(*places, strict=True), color=color, marker="o", markersize=4, label=name)
        axes.axhline(curve["figure"], color=MUTED, linestyle="--", linewidth=1, label="not compressed")
        axes.axvline(curve["bytes"]["experts"] / 1e6, color=MUTED, linestyle="--", linewidth=1)
        axes.set_title(f"{curve['corpus']}, {curve['split']}, k = {curve['top_k']} of {curve['n_experts']}")
        axes.set_xlabel("experts on disk (MB)")
        axes.set_ylabel(curve["metric"])
        axes.set_xlim(left=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
        image.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(image, dpi=150)
        pyplot.close(figure)
