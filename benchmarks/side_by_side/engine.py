"""What the engine adds to a step: the same model in a plain loop, and under ZeRO 0, 1 and 2, on one rank."""

from collections.abc import Iterator

from benchmarks.side_by_side.ours import OurTraining, PlainTraining, one_rank
from benchmarks.side_by_side.sizes import Sizes, Work
from benchmarks.side_by_side.step import way_of
from benchmarks.side_by_side.timing import Case, Way, clock_of

SECTION = "engine"
PLAIN, ENGINE = "plain loop", "engine, ZeRO {}"
STAGES = (0, 1, 2)


def ways_of(work: Work) -> tuple[list[Way], int]:
    """All ways of doing the step, and how many parameters are trained."""
    world = one_rank()
    run = work.run()
    plain = PlainTraining(run, work.top_k)
    ways = [way_of(PLAIN, run, plain.step)]
    for stage in STAGES:
        ways.append(way_of(ENGINE.format(stage), run, OurTraining(run, work.top_k, world, stage).step))
    return ways, sum(parameter.numel() for parameter in plain.model.parameters())


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """Both models, in fp32."""
    for work in sizes.engines:
        ways, n_parameters = ways_of(work)
        settings = {"model": work.name, "trained": n_parameters, "batch": work.batch, "threads": threads}
        yield Case(SECTION, settings, sizes.step_turns.take(ways, clock_of(threads)))
