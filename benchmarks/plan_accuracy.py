"""What `megamoe plan` says of runs beside what they do: parameters, FLOPs, memory and traffic.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_accuracy --output benchmarks/results/2026-11-28-plan-accuracy
    python -m benchmarks.plan_accuracy --quick

Models of all presets under all policies are built and counted. Small runs train for a few steps on 1, 2
and 4 real ranks with every expert-parallel size and ZeRO 0, 1 and 2, and every rank keeps accounts of what it
holds, sends and computes. Activations are measured as resident memory at four sizes. The exit code is 1 where
a prediction misses its bound.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.accuracy import live, peak
from benchmarks.accuracy.cases import EVEN, PEAKS, Case, all_cases, in_thirds
from benchmarks.accuracy.parameters import built
from benchmarks.accuracy.predicted import account_rows, parameter_rows, peak_rows
from benchmarks.accuracy.report import report
from benchmarks.accuracy.rows import MISSED, Row
from benchmarks.record import add_output, facts, keep
from megamoe.config.presets import PRESETS
from megamoe.moe.routers.registry import available
from tests.ranks import run_ranks

PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        presets: whose models are built.
        policies: that route in them.
        cases: runs on ranks.
        steps: counted ones of each.
        peaks: runs whose peak memory is measured.
    """

    presets: tuple[str, ...] = tuple(PRESETS)
    policies: tuple[str, ...] = available()
    cases: tuple[Case, ...] = tuple(all_cases())
    steps: int = live.STEPS
    peaks: tuple[Case, ...] = PEAKS


FULL = Sizes()
QUICK = replace(
    FULL,
    presets=("tiny_enwik8",),
    policies=("hyper", "pkm"),
    cases=(Case(EVEN, 2, 2, 1), Case(EVEN, 2, 1, 2)),
    peaks=(Case(in_thirds("tiny_enwik8", 4), 1, 1, 1),),
)


def measure(sizes: Sizes, say: Callable[[str], None]) -> Iterator[Row]:
    """Everything, row by row."""
    say(f"{len(sizes.policies)} policies in {len(sizes.presets)} presets")
    yield from parameter_rows(list(built(sizes.presets, sizes.policies)))
    for ranks, group in groupby(sizes.cases, key=lambda case: case.ranks):
        cases = list(group)
        say(f"{len(cases)} runs on {ranks} ranks")
        by_rank = run_ranks(live.accounts_here, ranks, cases, sizes.steps, timeout=PATIENCE_SECONDS)
        for case, accounts in zip(cases, zip(*by_rank, strict=True), strict=True):
            yield from account_rows(case, accounts)
    for case in sizes.peaks:
        say(f"memory of {case.shape.name}, {case.dtype}")
        yield from peak_rows(case, peak.peak_of(case), peak.saved(case))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small runs: does it work?")
    add_output(parser)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    result: dict[str, Any] = facts("benchmarks.plan_accuracy", torch.device("cpu")) | {
        "presets": len(sizes.presets), "policies": len(sizes.policies), "cases": len(sizes.cases),
        "ranks": max(case.ranks for case in sizes.cases), "steps": sizes.steps, "peak_steps": peak.STEPS,
    }  # fmt: skip
    rows = []
    for row in measure(sizes, _say):
        rows.append(row)
        if row.verdict == MISSED:
            _say(f"{MISSED}: {row}")
    text = report(result, rows)
    print(text)
    keep(result | {"rows": [row.to_dict() for row in rows]}, text, args.output)
    return int(any(row.verdict == MISSED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
