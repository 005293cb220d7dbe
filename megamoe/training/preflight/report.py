"""What preflight tells: tables for people, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.judge import Finding, gb
from megamoe.training.preflight.needs import Needs


@dataclass(frozen=True)
class Report:
    """Findings, and what they rest on; without measurements if ranks differ too much to measure.

    Attributes:
        speeds: bytes/s by collective and message size.
    """

    findings: Sequence[Finding]
    needs: Needs | None = None
    facts: Sequence[Facts] = ()
    speeds: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> dict[str, float]:
        """Time of each collective in one step, at its speed with the largest message, not overlapped."""
        return {
            name: getattr(self.needs, name) / by_size[max(by_size)]
            for name, by_size in self.speeds.items()
            if by_size
        }


def print_json(report: Report) -> None:
    """One object: needs, ranks, bytes_per_second, seconds_per_step, findings."""
    content = {
        "needs": asdict(report.needs) if report.needs else None,
        "ranks": [asdict(fact) for fact in report.facts],
        "bytes_per_second": report.speeds,
        "seconds_per_step": report.seconds_per_step,
        "findings": [asdict(finding) for finding in report.findings],
    }
    print(json.dumps(content, indent=2))


def print_report(report: Report) -> None:
    """Tables of the ranks and of the network, then one line for each finding."""
    console = Console()
    if report.needs:
        console.print(_ranks(report.facts))
        if report.speeds:
            console.print(_network(report))
        console.print(
            f"each rank needs {gb(report.needs.memory)} for weights, gradients and optimizer; a checkpoint"
            f" has {gb(report.needs.checkpoint)}",
            highlight=False,
        )
    for finding in report.findings:
        label = "problem" if finding.stops else "warning"
        console.print(f"{label}: {finding.text}", highlight=False, soft_wrap=True, markup=False)
    if not report.findings:
        console.print("all well: no node is the odd one out")


def _ranks(facts: Sequence[Facts]) -> Table:
    table = Table("rank", "host", "memory free", "link", "clock", "disk write", "disk read", "disk free")
    for fact in facts:
        table.add_row(
            str(fact.rank), fact.host, gb(fact.memory_free), _speed(fact.link),
            f"{fact.clock * 1000:+.1f} ms", _speed(fact.disk_write), _speed(fact.disk_read),
            gb(fact.disk_free),
        )  # fmt: skip
    return table


def _network(report: Report) -> Table:
    sizes = sorted({size for by_size in report.speeds.values() for size in by_size})
    table = Table("collective", *(f"{size >> 10:,} KiB" for size in sizes), "a step moves", "in")
    for name, seconds in report.seconds_per_step.items():
        speeds = (_speed(report.speeds[name][size]) for size in sizes)
        table.add_row(name.replace("_", "-"), *speeds, gb(getattr(report.needs, name)), f"{seconds:.3f} s")
    return table


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
