"""How fast megamoe is beside its peers on the same work, and how much memory it takes: ratios, not seconds.

    python -m benchmarks.speed --output benchmarks/results/2026-11-28-speed
    python -m benchmarks.speed --quick
    python -m benchmarks.speed --sections layer,attention --threads 1,2 --rounds 7

Ways of doing the same work take turns, in one process, in the order A B C and then C B A, on input that no
call has seen; bare matrix products take turns with them. docs/performance.md tells what each way is and how
to read the result.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.record import add_output, keep
from benchmarks.side_by_side import attention, engine, evaluation, layer, memory, step
from benchmarks.side_by_side.goals import goals
from benchmarks.side_by_side.machine import machine
from benchmarks.side_by_side.peers.transformers_moe import why_absent
from benchmarks.side_by_side.report import report, table
from benchmarks.side_by_side.sizes import FULL, QUICK, Sizes
from benchmarks.side_by_side.timing import Case

SECTIONS = {
    "layer": layer.measure,
    "attention": attention.measure,
    "step": step.measure,
    "evaluation": evaluation.measure,
    "engine": engine.measure,
    "memory": memory.measure,
}
BY_THREADS = ("layer", "attention", "step")
"""Sections that are measured for each number of threads; the others for the first alone."""

BUSY = 0.5
"""Load per core above which a time is not to be trusted."""


def measure(
    sizes: Sizes, sections: Sequence[str], threads: Sequence[int], say: Callable[[str], None]
) -> list[Case]:
    """All cases, each told when it is done."""
    cases = []
    for name in sections:
        for n_threads in threads if name in BY_THREADS else threads[:1]:
            torch.set_num_threads(n_threads)
            say(f"{name}, {n_threads} threads, load average {os.getloadavg()[0]:.1f}")
            for case in SECTIONS[name](sizes, n_threads):
                say(table([case]) + "\n")
                cases.append(case)
    return cases


def speed(
    sizes: Sizes, sections: Sequence[str], threads: Sequence[int], say: Callable[[str], None] = print
) -> tuple[dict[str, Any], list[Case]]:
    """Measure, and judge."""
    before = machine()
    if before["load"][0] > BUSY * (os.cpu_count() or 1):
        say(f"load average {before['load'][0]:.1f}: this machine is busy, and wall times mean little")
    absent = why_absent()
    left_out = f"transformers is left out: {absent}" if absent else ""
    if left_out:
        say(left_out)
    torch.manual_seed(1)
    cases = measure(sizes, sections, threads, say)
    result = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
        "quick": sizes.quick,
        "machine": before,
        "left_out": left_out,
        "rules": sizes.rules(),
        "sizes": asdict(sizes),
        "goals": [goal.judge(cases) for goal in goals(sizes)],
        "cases": [asdict(case) for case in cases],
    }
    return result, cases


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - SECTIONS.keys())
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", type=_names, default=list(SECTIONS), help=f"of {','.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it work?")
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 5, and 2 with --quick)")
    parser.add_argument("--threads", type=_numbers, default=[1], help="numbers of threads (default: 1)")
    parser.add_argument("--tokens", type=_numbers, help="tokens of the mixture layer (default: all sizes)")
    add_output(parser)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    if args.rounds:
        sizes = replace(
            sizes,
            turns=replace(sizes.turns, rounds=args.rounds),
            step_turns=replace(sizes.step_turns, rounds=args.rounds),
        )
    if args.tokens:
        sizes = replace(sizes, tokens=tuple(args.tokens))
    result, cases = speed(sizes, args.sections, args.threads, lambda line: print(line, flush=True))
    text = report(result, cases)
    print(text)
    keep(result, text, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
