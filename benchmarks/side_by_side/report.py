"""Cases and goals as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.side_by_side import attention, engine, evaluation, layer, memory, step
from benchmarks.side_by_side.timing import Case

BASES = {
    layer.SECTION: layer.OURS,
    attention.SECTION: attention.OURS,
    step.SECTION: step.HYPER,
    step.RANKS_SECTION: step.ONE_RANK,
    evaluation.SECTION: evaluation.SEPARATE,
    engine.SECTION: engine.PLAIN,
    memory.PEAK: step.PUBLISHED,
    memory.SAVED: layer.FASTMOE,
}
"""What the others are divided by, in the table of each section."""

APART = ("dtype", "threads")
"""Settings that make a table of their own."""

UNITS = {"s": ("ms", 1e3), "bytes": ("MB", 1e-6)}

REPORT = """\
# Speed beside others

{date}, `{command}`.

{machine}
- {rules}

Every figure is a ratio of medians (of minima in brackets) over the way in the second column, whose own
median is given in ms or MB; times without dropout (p = 0) are over ours without dropout. With one thread time
is CPU time of the process, with more it is wall time. What each way is, and how to read this, is in
[docs/performance.md](../../docs/performance.md).

## Goals

| goal | | must | stretch | medians | minima | |
|---|---|---|---|---|---|---|
{goals}

{remarks}

{tables}
"""


def report(result: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """The whole of it."""
    tables = [table(list(group)) for _, group in groupby(cases, key=_table_of)]
    return REPORT.format(
        date=result["date"], command=result["command"], machine=_machine(result["machine"]),
        rules=result["rules"],
        goals="\n".join(_goal(goal) for goal in result["goals"]),
        remarks=remarks(result), tables="\n\n".join(tables),
    )  # fmt: skip


def remarks(result: Mapping[str, Any]) -> str:
    """What a reader of the goals must know."""
    missed = [goal["goal"] for goal in result["goals"] if goal["verdict"] == "MISSED"]
    lines = [f"Goals that are missed: {'; '.join(missed)}." if missed else "No measured goal is missed."]
    if result["left_out"]:
        lines.append(f"{result['left_out']}.")
    if "amx_bf16" not in result["machine"]["flags"]:
        lines.append(
            "This processor has no AMX: goals in bf16 were set on one that has, where products in bf16 are"
            " 7 to 8 times as fast as in fp32."
        )
    if result["quick"]:
        lines.append("A quick run on small sizes: no judgement on the goals, which are about full sizes.")
    return "\n\n".join(lines)


def table(cases: Sequence[Case]) -> str:
    """Cases of one section that differ in more than `APART`."""
    first = cases[0]
    base, ways = BASES[first.section], list(first.values)
    unit, factor = UNITS[first.unit]
    apart = [f"{name} {first.settings[name]}" for name in APART if name in first.settings]
    others = [way for way in ways if way != base]
    lines = [
        f"## {', '.join([first.section, *apart])}",
        "",
        f"| | {base}, {unit} | {' | '.join(others)} |",
        "|---" * (2 + len(others)) + "|",
    ]
    for case in cases:
        name = ", ".join(f"{key} {value}" for key, value in case.settings.items() if key not in APART)
        cells = [_cell(case, way, base) for way in others]
        lines.append(f"| {name} | {factor * case.figure(base):.4g} | {' | '.join(cells)} |")
    checked = {name for case in cases for name in case.agreement}
    if checked:
        worst = max(value for case in cases for value in case.agreement.values())
        lines += [
            "",
            f"Compared with ours before: {', '.join(sorted(checked))}; apart by {worst:.1e} at most.",
        ]
    return "\n".join(lines)


def _table_of(case: Case) -> tuple[Any, ...]:
    return (case.section, *(case.settings.get(name) for name in APART))


def _cell(case: Case, way: str, base: str) -> str:
    if way.endswith("p = 0") and way != layer.PLAIN_OURS and case.section == layer.SECTION:
        base = layer.PLAIN_OURS
    median, minimum = (case.figure(way, of=of) / case.figure(base, of=of) for of in (statistics.median, min))
    return f"{median:.2f}" if len(case.values[way]) == 1 else f"{median:.2f} ({minimum:.2f})"


def _goal(goal: Mapping[str, Any]) -> str:
    median, minimum = ("-" if goal[of] is None else f"{goal[of]:.2f}" for of in ("median", "minimum"))
    figures = (goal["must"], goal["stretch"], median, minimum, goal["verdict"])
    return f"| {goal['goal']} | {goal['direction']} | {' | '.join(map(str, figures))} |"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    variables = ", ".join(f"`{name}={value}`" for name, value in machine["environment"].items())
    flags = " ".join(machine["flags"])
    return "\n".join([
        f"- {machine['processor']}, {machine['cores']} cores, {flags}; {machine['system']}",
        f"- load average {machine['load'][0]:.1f} at the start",
        f"- {versions}",
        f"- environment: {variables or 'nothing that matters'}",
    ])  # fmt: skip
