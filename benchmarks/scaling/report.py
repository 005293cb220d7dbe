"""The result as Markdown: a table for each section, and where the first limits are met."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scaling.growth import exponent, verdict, wall

SHARE = 0.01
"""Of a step."""
PATIENCE = 60.0
"""Seconds at the start, or with a checkpoint."""
FURTHEST = 16
"""A limit further away than so many times the largest size measured is not told: too much may change."""

REPORT = """\
# What a rank's own work costs as tokens, experts and ranks grow

{date}, `{command}`, {machine}.{quick}
{clock} of one rank on one core, median of 3; the other ranks are torch's fake process group. T tokens of a
rank, E experts of a layer, R expert-parallel ranks, W ranks. Tokens are 64 wide and take 2 experts.

Growth is the exponent of the size over the upper half of its range: of seconds, of functions called, of bytes
that tensor operations move, and of bytes held at once. Limits: {share:.0%} of a step of `{preset}` on this
core, which takes {step:.2f} s for {tokens:,} tokens in {layers} mixture layers, for what is done in all of
these; {patience:.0f} s for what is done once.

{tables}
## Limits that are met first

{limits}

A manifest has {manifest:.0f} bytes for each piece of each tensor.
"""


def report(result: Mapping[str, Any]) -> str:
    """The whole result."""
    quantities, step = result["quantities"], result["step"]
    sections = dict.fromkeys(quantity["section"] for quantity in quantities)
    return REPORT.format(
        **{name: result[name] for name in ("date", "command", "machine")},
        clock="CPU time",
        quick=" Sizes of a smoke run, whose exponents mean nothing." if result["quick"] else "",
        share=SHARE,
        patience=PATIENCE,
        preset=step["preset"],
        step=step["seconds"],
        tokens=step["tokens"],
        layers=step["layers"],
        tables="\n".join(
            _table(name, [q for q in quantities if q["section"] == name], step) for name in sections
        ),
        limits=_limits(quantities, step),
        manifest=result["manifest_bytes_per_piece"],
    )


def _table(section: str, quantities: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> str:
    lines = [
        f"## {section}\n",
        "| what | of | from | to | at | seconds | growth | calls | moved | peak | | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(quantity, step) for quantity in quantities),
    ]
    return "\n".join(lines) + "\n"


def _row(quantity: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    values, costs = _axes(quantity)
    beside = ", ".join(f"{name} = {value:,}" for name, value in quantity["beside"].items())
    counted = [exponent(values, _costs(quantity, name)) for name in ("calls", "moved", "peak")]
    slope = exponent(values, costs)
    limit = wall(values, costs, allowed(quantity["when"], step))
    cells = [
        f"{quantity['name']} ({quantity['when']}; {quantity['owner']})", quantity["size"],
        f"{values[0]:,}", f"{values[-1]:,}", beside, f"{_time(costs[0])} to {_time(costs[-1])}",
        f"{slope:.2f}", *(f"{growth:.2f}" for growth in counted), verdict(slope), _size(limit, values),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def allowed(when: str, step: Mapping[str, Any]) -> float:
    """Seconds that a quantity of this kind may take: in one layer, with one line of the log, or once."""
    if when == "step":
        return SHARE * step["seconds"] / step["layers"]
    return SHARE * step["seconds"] if when == "log" else PATIENCE


def _limits(quantities: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> str:
    """For each size the three quantities whose limits are nearest."""
    met: dict[str, list[tuple[float, str]]] = {}
    for quantity in quantities:
        values, costs = _axes(quantity)
        limit = wall(values, costs, allowed(quantity["when"], step))
        if limit is not None and limit <= FURTHEST * values[-1]:
            beside = "".join(f", {name} = {value:,}" for name, value in quantity["beside"].items())
            text = f"{quantity['name']}{beside} ({quantity['owner']})"
            met.setdefault(quantity["size"], []).append((limit, text))
    lines = [
        f"- {size} = {_rounded(limit)}: {text}"
        for size, found in met.items()
        for limit, text in sorted(found)[:3]
    ]
    return "\n".join(lines) or "None within reach."


def _axes(quantity: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return [point["value"] for point in quantity["points"]], _costs(quantity, "seconds")


def _costs(quantity: Mapping[str, Any], name: str) -> list[float]:
    return [point[name] for point in quantity["points"]]


def _size(limit: float | None, values: Sequence[float]) -> str:
    if limit is None:
        return "none"
    return _rounded(limit) if limit <= FURTHEST * values[-1] else f"over {_rounded(FURTHEST * values[-1])}"


def _rounded(value: float) -> str:
    """Two digits."""
    digits = 1 - math.floor(math.log10(value)) if value >= 1 else 0
    return f"{round(value, min(digits, 0)):,.0f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
