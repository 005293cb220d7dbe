"""Bytes: the peak of steps, in a process of its own for each way, and what a layer keeps for its backward."""

from collections.abc import Iterator

from benchmarks.side_by_side import layer as layers
from benchmarks.side_by_side.ours import OurTraining, one_rank
from benchmarks.side_by_side.peers.published import PublishedTraining
from benchmarks.side_by_side.sizes import Sizes, Work
from benchmarks.side_by_side.space import peak_bytes, saved_bytes
from benchmarks.side_by_side.step import OURS, PATIENCE_SECONDS, PUBLISHED, draw_tokens
from benchmarks.side_by_side.timing import DTYPES, Case, cast
from tests.ranks import run_ranks

PEAK, SAVED = "memory of a step", "memory kept by the layer"
NOTHING = "imports alone"
STEPS = 3
"""The memory of the model is full in the second step; the third meets what the second has left."""


def peak_of_steps(way: str, work: Work) -> int:
    """The peak of this process after some steps."""
    run = work.run()
    if way == NOTHING:
        return peak_bytes()
    dtypes = {OURS.format(dtype): dtype for dtype in DTYPES}
    # Joining a group lets the allocator keep freed memory, which only ours asks for.
    if way == PUBLISHED:
        step = PublishedTraining(run, work.top_k).step
    else:
        step = OurTraining(run, work.top_k, one_rank(), dtype=dtypes[way]).step
    for number in range(STEPS):
        step(draw_tokens(run, way, number))
    return peak_bytes()


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """Peaks of steps at the published batch, then what layers keep."""
    small = sizes.small
    work = Work(small.name, small.overrides, sizes.memory_batch, small.top_k)
    ways = (PUBLISHED, *(OURS.format(dtype) for dtype in DTYPES), NOTHING)
    peaks = {
        way: [float(run_ranks(peak_of_steps, 1, way, work, timeout=PATIENCE_SECONDS)[0])] for way in ways
    }
    settings = {"model": work.name, "batch": work.batch, "top_k": work.top_k}
    yield Case(PEAK, settings, peaks, unit="bytes")
    one_rank()
    yield from (measure_saved(sizes, dtype, top_k) for dtype in DTYPES for top_k in sizes.top_ks)


def measure_saved(sizes: Sizes, dtype: str, top_k: int) -> Case:
    """What every layer keeps of the same tokens, under balanced routing."""
    run = sizes.small.run()
    x_TD = layers.draw_tokens(run, sizes.goal_tokens, "memory", 0, DTYPES[dtype]).requires_grad_()
    kept = {}
    for name, layer in layers.layers(run, top_k, False).items():
        moved = cast(layer, DTYPES[dtype])
        kept[name] = [float(saved_bytes(moved, lambda moved=moved: moved(x_TD)))]  # type: ignore[misc]
    settings = {"tokens": sizes.goal_tokens, "top_k": top_k, "dtype": dtype}
    return Case(SAVED, settings, kept, unit="bytes")
