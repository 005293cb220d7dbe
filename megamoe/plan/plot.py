"""Memory of a rank by kind, for the chosen layout and the best ones, against what the device has."""

from pathlib import Path

from megamoe.plan.estimate import Estimate
from megamoe.plan.layouts import Plan
from megamoe.plan.report import KINDS
from megamoe.plot_style import ACCENT, MUTED, STYLE, TRAIN, VALID

COLORS = (ACCENT, TRAIN, *VALID, "#b07aa1", "#6f4e37")


def plot_memory(made: Plan, image: Path) -> Path:
    """Draw a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {"chosen": made.chosen} | {f"best {i}": one for i, one in enumerate(made.best, start=1)}
    device = made.chosen.cluster.device
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        axes.set_title(f"Memory of a rank on {made.chosen.cluster.ranks:,} {device.name}")
        below = [0.0] * len(bars)
        for kind, color in zip(KINDS, COLORS, strict=True):
            values = [getattr(one.memory, kind) / 1e9 for one in bars.values()]
            axes.bar(list(bars), values, 0.6, bottom=below, color=color, label=kind.replace("_", " "))
            below = [a + b for a, b in zip(below, values, strict=True)]
        axes.axhline(device.memory / 1e9, color=MUTED, label="device")
        axes.axhline(made.chosen.usable / 1e9, color=MUTED, linestyle="--", label="for tensors")
        axes.set_xticks(range(len(bars)), [_label(name, one) for name, one in bars.items()])
        axes.set_ylabel("GB")
        axes.grid(False, axis="x")
        figure.legend(loc="outside right upper")
        figure.savefig(image, dpi=150)
        pyplot.close(figure)
    return image


def _label(name: str, one: Estimate) -> str:
    layout = one.layout
    batch = f"{layout.micro_batch_size} x {layout.accumulation}"
    return f"{name}\nep {layout.ep_size}, {batch}\nZeRO {layout.zero_stage}"
