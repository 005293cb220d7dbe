"""What a rank's own work costs as tokens, experts and ranks grow: everything that is not the model.

Routing, losses and health, sorting, the plan of the exchange, process groups, engine, config, checkpoints of
many ranks, the share of the text: each as a function of one size, up to 4096 experts and 4096 ranks. The
other ranks do not exist: torch's fake process group stands for them, whose collectives return at once.

seconds   CPU time of one rank, median
growth    exponent of the size over the upper half of its range: 1 is linear, 2 quadratic
calls     the same for the number of functions called, moved for bytes that tensor operations read and write,
          peak for bytes held at once: counts, which no other job on the machine can disturb
limit     1 % of a training step, in all mixture layers together, or a minute at the start or with a
          checkpoint; and the size at which it is met, if it goes on as it does at the end of the range

    OMP_NUM_THREADS=1 python -m benchmarks.own_work --output benchmarks/results/2026-11-28-own-work
    python -m benchmarks.own_work --quick --sections checkpoints
    python -m benchmarks.own_work --only "all-to-all"
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.record import add_output, facts, keep
from benchmarks.scaling import checkpoints, routing, start
from benchmarks.scaling.counting import count
from benchmarks.scaling.quantity import FULL, QUICK, Action, Quantity, Sizes
from benchmarks.scaling.report import report
from megamoe.config import load_config
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.memory import keep_freed_memory

SECTIONS: Mapping[str, Callable[[Sizes], Iterator[Quantity]]] = {
    "routing": routing.quantities,
    "start": start.quantities,
    "checkpoints": checkpoints.quantities,
}
ROUNDS = 3
LONG = 0.5
"""Seconds from which a run is timed once."""
VOCAB_SIZE = 256


def seconds_of(action: Action, at_least: float) -> float:
    """Median CPU seconds of one run, over rounds that last as long together; the first run does not count.

    Python collects no garbage meanwhile: that would look at everything this process holds by then.
    """
    n_runs, n_rounds = 1, ROUNDS if _seconds(action, 1) < LONG else 1
    gc.collect()
    gc.disable()
    try:
        while True:
            rounds = [_seconds(action, n_runs) for _ in range(n_rounds)]
            if sum(rounds) >= at_least:
                return statistics.median(rounds) / n_runs
            n_runs *= 2
    finally:
        gc.enable()


def _seconds(action: Action, n_runs: int) -> float:
    begin = time.process_time()
    for _ in range(n_runs):
        action()
    return time.process_time() - begin


def measure(quantity: Quantity, at_least: float) -> dict[str, Any]:
    """Time and counts at every value."""
    points = []
    for value in quantity.values:
        with quantity.at(value) as action:
            seconds = seconds_of(action, at_least)
            points.append({"value": value, "seconds": seconds, **asdict(count(action))})
    described = {name: getattr(quantity, name) for name in ("name", "when", "size", "beside", "owner")}
    return {**described, "points": points}


def step_of(preset: str, at_least: float) -> dict[str, Any]:
    """Seconds of a training step with Adam, and the numbers of its tokens and mixture layers."""
    run = load_config(preset=preset)
    model = TransformerXL(replace(run.model, vocab_size=VOCAB_SIZE), run.moe, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    tokens_BN = torch.randint(VOCAB_SIZE, (4, run.model.segment_len + 1))

    def step() -> None:
        loss_BS = model(tokens_BN[:, :-1], tokens_BN[:, 1:], top_k=2).loss_BS
        assert loss_BS is not None
        loss_BS.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    n_layers = len(run.moe.layer_indices(run.model.n_layers))
    seconds = seconds_of(step, at_least)
    return {"preset": preset, "tokens": tokens_BN[:, 1:].numel(), "layers": n_layers, "seconds": seconds}


def own_work(sizes: Sizes, sections: Sequence[str], only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of all quantities whose names hold `only`, and of the step that they are compared with."""
    torch.manual_seed(1)
    step = step_of(sizes.step, sizes.seconds)
    measured = []
    for section in sections:
        for quantity in (quantity for quantity in SECTIONS[section](sizes) if only in quantity.name):
            measured.append({"section": section} | measure(quantity, sizes.seconds))
            last = measured[-1]["points"][-1]
            say(f"{quantity.name}: {quantity.size} = {last['value']:,}: {last['seconds']:.3g} s")
    manifest = checkpoints.manifest_bytes_per_piece(sizes.n_ranks, sizes.n_tensors)
    return {"step": step, "manifest_bytes_per_piece": manifest, "quantities": measured}


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, each measured once")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="what has TEXT in its name alone")
    add_output(parser)
    args = parser.parse_args()
    sections = args.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"argument --sections: {min(unknown)!r}: choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    sizes = QUICK if args.quick else FULL
    result = facts("benchmarks.own_work", torch.device("cpu"))
    result |= {"quick": args.quick} | own_work(
        sizes, sections, args.only, lambda line: print(line, file=sys.stderr)
    )
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
