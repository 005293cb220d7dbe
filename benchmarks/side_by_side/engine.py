"""What the engine adds to a step: the same model in a plain loop, and under ZeRO 0, 1 and 2, on one rank."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.side_by_side.ours import OurTraining, PlainTraining, one_rank
from benchmarks.side_by_side.sizes import Sizes, Work
from benchmarks.side_by_side.step import way_of
from benchmarks.side_by_side.timing import Case, Way, clock_of

SECTION = "engine"
PLAIN, ENGINE = "plain loop", "engine, ZeRO {}"
STAGES = (0, 1, 2)


def ways_of(work: Work, opened: ExitStack) -> tuple[list[Way], int]:
    """All ways of doing the step, for as long as `opened` is, and how many parameters are trained."""
    run = work.run()
    plain = PlainTraining(run, work.top_k)
    ways = [way_of(PLAIN, run, plain.step)]
    for stage in STAGES:
        ours = opened.enter_context(OurTraining(run, work.top_k, one_rank(), stage))
        ways.append(way_of(ENGINE.format(stage), run, ours.step))
    return ways, sum(parameter.numel() for parameter in plain.model.parameters())


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """Both models, in fp32."""
    for work in sizes.engines:
        with ExitStack() as opened:
            ways, n_parameters = ways_of(work, opened)
            seconds = sizes.step_turns.take(ways, clock_of(threads))
        settings = {"model": work.name, "trained": n_parameters, "batch": work.batch, "threads": threads}
        yield Case(SECTION, settings, seconds)
