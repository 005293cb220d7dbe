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
CPU time of one rank on one core, median of 3, without Python's collection of garbage; the other ranks are
torch's fake process group. T tokens of a rank, E experts of a layer, R expert-parallel ranks, W ranks. Tokens
are 64 wide and take 2 experts.

Growth is the exponent of the size over the upper half of its range: of seconds, of functions called, of
bytes that tensor operations move, and of bytes held at once, whose largest number stands beside it.

The limit is {share:.0%} of a step of `{preset}` for what is done in each of its layers, all together, or in
the step, and {patience:.0f} s for what is done once. First stands the part of it that the largest
size takes, then the size that takes all of it. The step takes {step:.2f} s on this core for {tokens:,}
tokens in {layers} mixture layers, and counts as proportional to the tokens.

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


def parts(quantity: Mapping[str, Any], step: Mapping[str, Any]) -> list[float]:
    """What is spent of the limit at each value; 1 is all of it."""
    return [point["seconds"] / _allowed(quantity, point["value"], step) for point in quantity["points"]]


def _allowed(quantity: Mapping[str, Any], value: int, step: Mapping[str, Any]) -> float:
    """Seconds: in one layer of a step, in the step, or once."""
    if quantity["when"] not in ("layer", "step"):
        return PATIENCE
    n_tokens = value if quantity["size"] == "T" else quantity["beside"].get("T", step["tokens"])
    seconds = SHARE * step["seconds"] * n_tokens / step["tokens"]
    return seconds / step["layers"] if quantity["when"] == "layer" else seconds


def _table(section: str, quantities: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> str:
    lines = [
        f"## {section}\n",
        "| what | of | from, to | at | seconds | growth | verdict | calls | moved | peak | limit | met at |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(quantity, step) for quantity in quantities),
    ]
    return "\n".join(lines) + "\n"


def _row(quantity: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    values, costs = _axis(quantity, "value"), _axis(quantity, "seconds")
    spent, slope = parts(quantity, step), exponent(values, costs)
    calls, moved, peak = (exponent(values, _axis(quantity, name)) for name in ("calls", "moved", "peak"))
    cells = [
        f"{quantity['name']} ({quantity['when']}; {quantity['owner']})", quantity["size"],
        f"{values[0]:,}, {values[-1]:,}", _beside(quantity), f"{_time(costs[0])}, {_time(costs[-1])}",
        f"{slope:.2f}", verdict(slope), f"{calls:.2f}", f"{moved:.2f}",
        f"{peak:.2f}, {_axis(quantity, 'peak')[-1] / 1e6:.3g} MB", f"{spent[-1]:.2g}",
        _size(_met(quantity, step), values),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _met(quantity: Mapping[str, Any], step: Mapping[str, Any]) -> float | None:
    """The size that takes all of the limit. A step grows with its tokens, and its limit with it."""
    return None if quantity["size"] == "T" else wall(_axis(quantity, "value"), parts(quantity, step), 1.0)


def _limits(quantities: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> str:
    """For each size, of each owner the three quantities whose limits are nearest."""
    met: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for quantity in quantities:
        limit = _met(quantity, step)
        if limit is not None and limit <= FURTHEST * _axis(quantity, "value")[-1]:
            where = f" at {_beside(quantity)}" if quantity["beside"] else ""
            met.setdefault((quantity["size"], quantity["owner"]), []).append(
                (limit, quantity["name"] + where)
            )
    lines = [
        f"- {size} = {_rounded(limit)}: {text} ({owner})"
        for (size, owner), found in met.items()
        for limit, text in sorted(found)[:3]
    ]
    return "\n".join(lines) or "None within reach."


def _beside(quantity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value:,}" for name, value in quantity["beside"].items())


def _axis(quantity: Mapping[str, Any], name: str) -> list[float]:
    return [point[name] for point in quantity["points"]]


def _size(limit: float | None, values: Sequence[float]) -> str:
    if limit is None:
        return "none"
    return _rounded(limit) if limit <= FURTHEST * values[-1] else f"over {_rounded(FURTHEST * values[-1])}"


def _rounded(value: float) -> str:
    """Two digits."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, min(digits, 0)):,.0f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
