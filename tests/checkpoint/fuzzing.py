"""Damage copies of a checkpoint, and see that reading each is bounded, runs nothing and tells no lie."""

import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoint.hostile import Mutation

MOST_SECONDS = 30  # far above any case (the median is some milliseconds): it tells a hang, not a speed
MOST_EXTRA_BYTES = 400 << 20


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Interrupt what hangs, as a read of a pipe does."""

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def fuzz(
    pristine: Path,
    mutations: Sequence[Mutation],
    seeds: Iterable[int],
    outcome: Callable[[Path], str],
    scratch: Path,
) -> Counter[str]:
    """How often each outcome came.

    Args:
        pristine: the checkpoint's folder.
        mutations: used in turn.
        seeds: one case each.
        outcome: reads a folder and tells what came of it; it must not raise.
        scratch: an empty folder.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    for index, seed in enumerate(seeds):
        mutate, folder = mutations[index % len(mutations)], scratch / str(seed) / pristine.name
        shutil.copytree(pristine, folder)
        mutate(random.Random(seed), folder)
        try:
            with at_most(MOST_SECONDS):
                outcomes[outcome(folder)] += 1
        except BaseException as error:
            pytest.fail(f"seed {seed}, {mutate.__name__}: {type(error).__name__}: {error}"[:500])
        assert not (folder.parent / "executed").exists(), f"seed {seed}, {mutate.__name__}"
        shutil.rmtree(folder.parent)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert extra < MOST_EXTRA_BYTES
    return outcomes
