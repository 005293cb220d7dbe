"""What preflight tells: tables for people, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich import box
from rich.table import Table

from megamoe.plan.units import flop_rate, size, speed
from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.judge import Finding, Speeds
from megamoe.training.preflight.needs import Needs
from megamoe.training.terminal import open_terminal


@dataclass(frozen=True)
class Report:
    """Findings, and what they rest on; without measurements if ranks differ too much to measure.

    Attributes:
        seconds: of `megamoe.training.preflight.judge.seconds_of`.
    """

    findings: Sequence[Finding]
    needs: Needs | None = None
    facts: Sequence[Facts] = ()
    speeds: Speeds = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def print_json(report: Report) -> None:
    """One object: needs, ranks, bytes_per_second, seconds, findings."""
    content = {
        "needs": asdict(report.needs) if report.needs else None,
        "ranks": [asdict(fact) for fact in report.facts],
        "bytes_per_second": report.speeds,
        "seconds": report.seconds,
        "findings": [asdict(finding) for finding in report.findings],
    }
    print(json.dumps(content, indent=2))


def print_report(report: Report) -> None:
    """Tables of the ranks and of what the run asks of them, then one line for each finding."""
    console = open_terminal()
    if report.needs:
        console.print(_ranks(report.facts))
        if any(report.speeds.values()):
            console.print(_network(report.speeds))
        console.print(_needed(report.needs, report.facts, report.seconds))
    for finding in report.findings:
        label = "problem" if finding.stops else "warning"
        console.print(f"{label}: {finding.text}", highlight=False, soft_wrap=True, markup=False)
    if not report.findings:
        console.print("all well: no node is the odd one out")


def _ranks(facts: Sequence[Facts]) -> Table:
    on_gpus = any(fact.gpu_free is not None for fact in facts)
    columns = ("rank", "host", "RAM free", *(["GPU free"] if on_gpus else []), "arithmetic", "link", "clock")
    table = Table(*columns, "write", "read", "disk free", box=box.SIMPLE_HEAD)
    for fact in facts:
        table.add_row(
            str(fact.rank), fact.host, size(fact.host_free), *([size(fact.gpu_free or 0)] if on_gpus else []),
            flop_rate(fact.flops), speed(fact.link), f"{fact.clock * 1000:+.1f} ms", speed(fact.disk_write),
            speed(fact.disk_read), size(fact.disk_free),
        )  # fmt: skip
    return table


def _network(speeds: Speeds) -> Table:
    sizes = sorted({n_bytes for by_size in speeds.values() for n_bytes in by_size})
    table = Table("messages of", *(f"{n_bytes >> 10:,} KiB" for n_bytes in sizes), box=box.SIMPLE_HEAD)
    for name, by_size in speeds.items():
        if by_size:
            table.add_row(name.replace("_", "-"), *(speed(by_size[n_bytes]) for n_bytes in sizes))
    return table


def _needed(needs: Needs, facts: Sequence[Facts], seconds: dict[str, float]) -> Table:
    table = Table("a rank needs", "", "seconds", box=box.SIMPLE_HEAD)
    rows = {
        "all-reduce, a step": (size(needs.all_reduce), "all_reduce"),
        "all-to-all, a step": (size(needs.all_to_all), "all_to_all"),
        "arithmetic, a step": (f"{needs.flops / 1e9:,.3g} GFLOP", "arithmetic"),
        "checkpoint": (size(needs.checkpoint / len(facts)), "checkpoint"),
        "memory before activations": (size(needs.memory), ""),
        "host memory beside": (size(needs.host_memory), ""),
    }
    for name, (amount, key) in rows.items():
        table.add_row(name, amount, f"{seconds[key]:.2g}" if key else "")
    return table
