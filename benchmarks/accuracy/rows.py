"""What was predicted and what was measured, and whether the two agree as far as was promised."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MET, MISSED, NOT_PROMISED = "met", "MISSED", ""

SHOWN = 0.0005
"""Deviations below it are not told in tables."""


@dataclass(frozen=True)
class Claim:
    """What is promised of a group of figures.

    Attributes:
        name: of the group.
        bound: the largest deviation of a prediction, relative to what is measured.
        unit: of the figures.
    """

    name: str
    bound: float
    unit: str


PARAMETERS = Claim("parameters", 0.0, "numbers")
FLOPS = Claim("FLOPs of a step", 0.01, "FLOPs")
HELD = Claim("bytes that a rank holds", 0.02, "bytes")
SENT = Claim("bytes that a rank sends in a step", 0.02, "bytes")
ACTIVATIONS = Claim("activations", 0.15, "bytes")
CLAIMS = (PARAMETERS, FLOPS, HELD, SENT, ACTIVATIONS)


@dataclass(frozen=True)
class Row:
    """One figure, of something that there is or that was predicted.

    Attributes:
        claim: what is promised of it.
        case: the run.
        quantity: what is counted.
        measured: the count.
        predicted: by the plan; None where it says nothing, which is recorded all the same.
        promised: whether the plan is held to it.
    """

    claim: Claim
    case: str
    quantity: str
    measured: float
    predicted: float | None = None
    promised: bool = True

    @property
    def ratio(self) -> float | None:
        """Predicted by measured; 1 where both are nothing."""
        if self.predicted is None:
            return None
        if self.measured == 0:
            return 1.0 if self.predicted == 0 else math.inf
        return self.predicted / self.measured

    @property
    def deviation(self) -> float:
        """How far the ratio is from 1."""
        return 0.0 if self.ratio is None else abs(self.ratio - 1)

    @property
    def verdict(self) -> str:
        """Whether the claim holds here."""
        if self.predicted is None or not self.promised:
            return NOT_PROMISED
        return MET if self.deviation <= self.claim.bound else MISSED

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self) | {"claim": self.claim.name, "bound": self.claim.bound}
        return values | {"ratio": self.ratio, "verdict": self.verdict}


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """One line of a Markdown table for each claim that rows are about."""
    for claim in CLAIMS:
        judged = [row for row in rows if row.claim == claim and row.verdict != NOT_PROMISED]
        if judged:
            worst = max(judged, key=lambda row: row.deviation)
            missed = sum(row.verdict == MISSED for row in judged)
            verdict = f"{MISSED} by {missed}" if missed else MET
            yield (
                f"| {claim.name} | {_percent(claim.bound)} | {len(judged)} | {_percent(worst.deviation)}:"
                f" {worst.quantity}, {worst.case} | {verdict} |"
            )


def table(rows: Sequence[Row]) -> str:
    """Cases below each other, quantities side by side: what was measured, how far the prediction is off."""
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    found = {(row.case, row.quantity): row for row in rows}
    lines = [f"| | {' | '.join(quantities)} |", f"|---|{'---|' * len(quantities)}"]
    for case in dict.fromkeys(row.case for row in rows):
        cells = [_cell(found.get((case, quantity))) for quantity in quantities]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row.measured:,.0f}"
    if row.ratio is None or row.deviation < SHOWN:
        return text
    mark = "**" if row.verdict == MISSED else "" if row.promised else "*"
    return f"{text} ({mark}{100 * (row.ratio - 1):+.1f} %{mark})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
