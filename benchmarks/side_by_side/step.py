"""Whole training steps: forward, backward, clipping, Adam."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch

from benchmarks.side_by_side import products
from benchmarks.side_by_side.ours import OurTraining, one_rank, with_kernels
from benchmarks.side_by_side.peers.published import PublishedTraining
from benchmarks.side_by_side.sizes import Sizes, Work
from benchmarks.side_by_side.timing import DTYPES, Case, Turns, Way, clock_of
from megamoe.config import RunConfig
from megamoe.moe.initialization import generator
from tests.ranks import run_ranks

SECTION = "step"
PUBLISHED = "published algorithm"
OURS, HYPER, LINEAR = "ours, {}", "ours, fp32", "ours, fp32, linear router"
COMPILED = "ours, {}, compiled kernels"
AGAIN = "ours, fp32, once more"
"""A second engine of the same run: how far apart two ways are that do not differ."""
FLOOR = "bare products and Adam, {}"
RANKS_SECTION = "ranks"
PATIENCE_SECONDS = 1800.0
ONE_RANK, TWO_RANKS = "one rank", "two expert-parallel ranks"


def draw_tokens(run: RunConfig, way: str, number: int) -> torch.Tensor:
    """Random tokens [B, S + 1] of step `number` of a way."""
    shape = (run.training.batch_size, run.model.segment_len + 1)
    return torch.randint(run.model.vocab_size, shape, generator=generator(number, way))


def way_of(name: str, run: RunConfig, step: Callable[..., object]) -> Way:
    """Steps on tokens that no step has seen."""
    return Way(name, step, lambda number: (draw_tokens(run, name, number),))


class Floor:
    """The matrix products of a step in one type, and fused Adam on as many numbers in fp32."""

    def __init__(self, run: RunConfig, batch: int, top_k: int, dtype: torch.dtype, n_parameters: int) -> None:
        self.products = products.Products(products.step(run, batch, top_k), dtype)
        flat = torch.nn.Parameter(torch.zeros(n_parameters))
        flat.grad = torch.full_like(flat, 1e-3)
        self.adam = torch.optim.Adam([flat], fused=True)

    def __call__(self) -> None:
        """Run them."""
        self.products()
        self.adam.step()


def ways_of(work: Work, opened: ExitStack) -> list[Way]:
    """All ways of doing the step, for as long as `opened` is."""
    run, linear, top_k = work.run(), work.run("smoe"), work.top_k

    def training(run: RunConfig, dtype: str = "fp32") -> OurTraining:
        return opened.enter_context(OurTraining(run, top_k, one_rank(), dtype=dtype))

    published = PublishedTraining(run, top_k)
    n_parameters = sum(parameter.numel() for parameter in published.model.parameters())
    ways = [way_of(PUBLISHED, run, published.step)]
    for name in DTYPES:
        ways.append(way_of(OURS.format(name), run, training(run, name).step))
        ways.append(way_of(COMPILED.format(name), run, with_kernels(training(run, name).step)))
    for name, other in ((AGAIN, run), (LINEAR, linear)):
        ways.append(way_of(name, run, training(other).step))
    for name, dtype in DTYPES.items():
        ways.append(Way(FLOOR.format(name), Floor(run, work.batch, top_k, dtype, n_parameters)))
    return ways


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """Steps on one rank, of the small run and of a larger one; with one thread for each also on two ranks."""
    for work in filter(None, (sizes.small, sizes.large)):
        with ExitStack() as opened:
            seconds = sizes.step_turns.take(ways_of(work, opened), clock_of(threads))
        settings = {"model": work.name, "batch": work.batch, "top_k": work.top_k, "threads": threads}
        yield Case(SECTION, settings, seconds)
    if threads == 1:
        yield from measure_ranks(sizes)


def measure_ranks(sizes: Sizes) -> Iterator[Case]:
    """Wall time of the same global batch on one rank and on two, in processes of their own."""
    work = sizes.small
    batch = work.batch + work.batch % 2  # one half for each
    work = Work(work.name, work.overrides, batch, work.top_k)
    for dtype in DTYPES:
        values = {
            name: run_ranks(
                seconds_of_steps, n_ranks, work, dtype, sizes.step_turns, timeout=PATIENCE_SECONDS
            )[0]
            for name, n_ranks in ((ONE_RANK, 1), (TWO_RANKS, 2))
        }
        settings = {"model": work.name, "batch": batch, "top_k": work.top_k, "dtype": dtype}
        yield Case(RANKS_SECTION, settings, values)


def seconds_of_steps(work: Work, dtype: str, turns: Turns) -> list[float]:
    """Wall time of steps on the ranks that this process is one of."""
    run = work.run()
    with OurTraining(run, work.top_k, one_rank(), dtype=dtype) as ours:
        return turns.take([way_of("ranks", run, ours.step)], time.perf_counter)["ranks"]
