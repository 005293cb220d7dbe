"""What `bench_serving` has found, as Markdown and as an image."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megamoe.serve.measurement import MODES, RESIDENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values: TypeAlias = dict[str, Any]

_REPORT = """\
{date}, `{command}`.
{corpus}, {split} split, {tokens:,} {unit}s{how}, k = {top_k} of {n_experts} experts, {policy}.
{machine}.

| mode | budget | slots per layer | experts in memory, MiB | peak of the process, MiB | needed experts in a slot | loads | MiB moved per token | waiting | tokens/s | {metric} | same losses |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|
{rows}

Peak: the most memory in RAM while reading (`VmHWM` of a fresh process, mapped files included), of which
{floor:.0f} MiB were there before the model was loaded. Waiting: share of the time that computing waited for
copies. Same losses: those of all tokens are bit for bit those of the resident model.

Loads on demand that each policy would have needed, and Belady's, who knows the future:

| budget | needed experts | {policies} | belady |
|---:|---:|{ruler}---:|
{misses}
"""  # noqa: E501


def report(result: Values) -> str:
    """The result as Markdown, without a heading; `command` and `date` are those of the caller."""
    names = [name for name in result["policies"][0] if name not in ("budget", "needed", "belady")]
    misses = [
        f"| {entry['budget']} | {entry['needed']:,} | "
        + " | ".join(f"{entry[name]:,}" for name in (*names, "belady"))
        + " |"
        for entry in result["policies"]
    ]
    at_once = result["at_once"]
    return _REPORT.format(
        **result | {
            "how": " one by one" if at_once == 1 else f", {at_once} at once",
            "rows": "\n".join(_line(row, result["metric"]) for row in result["rows"]),
            "floor": result["rows"][0]["floor_bytes"] / 2**20,
            "policies": " | ".join(names), "ruler": "---:|" * len(names), "misses": "\n".join(misses),
        }
    )  # fmt: skip


def _line(row: Values, metric: str) -> str:
    traffic = row["traffic"]
    cells = [row["mode"], row["budget"] or "", row["n_slots"] or "all"]
    cells += [f"{row['slot_bytes'] / 2**20:.1f}", f"{row['peak_bytes'] / 2**20:.0f}"]
    if traffic:
        cells += [f"{100 * traffic['hit_rate']:.1f} %", f"{traffic['loads']:,}"]
        cells += [f"{row['bytes_per_token'] / 2**20:.3f}", f"{100 * traffic['stall'] / row['seconds']:.1f} %"]
    else:
        cells += ["100 %", "0", "0", "0 %"]
    cells += [f"{row['tokens_per_second']:.1f}", f"{row[metric]:.4f}", "yes" if row["same"] else "no"]
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(result: Values, image: Path) -> None:
    """Needed experts in a slot, and tokens per second, by memory for experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from megamoe.plot_style import MUTED, STYLE

    with pyplot.rc_context(STYLE):
        figure, (hits, speed) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        title = f"Experts in few slots, {result['corpus']}"
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        _draw(hits, result, "Needed experts in a slot, %", lambda row: 100 * row["traffic"]["hit_rate"])
        _draw(speed, result, "Tokens per second", lambda row: row["tokens_per_second"])
        resident = result["rows"][0]
        speed.axhline(resident["tokens_per_second"], color=MUTED, linestyle="--", label=RESIDENT)
        speed.set_ylim(bottom=0)
        hits.legend()
        speed.legend()
        figure.savefig(image, dpi=140)
        pyplot.close(figure)


def _draw(axes: "Axes", result: Values, title: str, value: Any) -> None:
    axes.set_title(title)
    axes.set_xlabel("memory for experts, % of all")
    all_bytes = result["rows"][0]["slot_bytes"]
    for mode in MODES[1:]:
        rows = [row for row in result["rows"] if row["mode"] == mode]
        points = sorted((100 * row["slot_bytes"] / all_bytes, value(row)) for row in rows)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=mode)
