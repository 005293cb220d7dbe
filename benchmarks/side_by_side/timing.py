"""Ways of doing the same work, timed in turns."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Times = dict[str, list[float]]


def _nothing(number: int) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class Way:
    """One way of doing some work.

    Attributes:
        name: by which it is reported.
        run: does the work.
        fresh: what call `number` works on, made outside the time. Each way draws it from a seed of its own:
            ways that saw the same row counts would share what the first of them made torch compile.
    """

    name: str
    run: Callable[..., object]
    fresh: Callable[[int], tuple[Any, ...]] = _nothing


@dataclass(frozen=True)
class Turns:
    """How often each way is called: `warmup` calls that do not count, then `rounds` that do."""

    rounds: int
    warmup: int

    def take(self, ways: Sequence[Way], clock: Callable[[], float]) -> Times:
        """Seconds of each counted call; the order is A B C in one round and C B A in the next."""
        seconds: Times = {way.name: [] for way in ways}
        for number in range(self.warmup + self.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                inputs = way.fresh(number)
                begin = clock()
                way.run(*inputs)
                elapsed = clock() - begin
                if number >= self.warmup:
                    seconds[way.name].append(elapsed)
        return seconds


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time of the process with one thread; wall time with more, which spin while they wait."""
    return time.process_time if threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Case:
    """What was measured once: the same work, done in several ways.

    Attributes:
        section: which part of the benchmark it is of.
        settings: what tells it from the other cases of the section.
        values: figures of each way, one for each round.
        unit: of the figures, "s" or "bytes".
        agreement: relative deviation of outputs from ours, by way, looked at before the time was taken.
    """

    section: str
    settings: dict[str, Any]
    values: Times
    unit: str = "s"
    agreement: dict[str, float] = field(default_factory=dict)

    def matches(self, section: str, settings: dict[str, Any]) -> bool:
        """Whether it is of that section and has all those settings."""
        return self.section == section and settings.items() <= self.settings.items()

    def figure(
        self, way: str, less: str = "", of: Callable[[Iterable[float]], float] = statistics.median
    ) -> float:
        """The median of a way, or what else `of` says, without that of the way `less`."""
        return of(self.values[way]) - (of(self.values[less]) if less else 0.0)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`module` with its parameters in `dtype`; buffers stay, as under DeepSpeed."""
    for parameter in module.parameters():
        parameter.data = parameter.to(dtype)
    return module


def forget_gradients(*modules: torch.nn.Module) -> None:
    """Let the next backward pass write gradients, not add to those that are there."""
    for module in modules:
        module.zero_grad(set_to_none=True)


class DisagreementError(Exception):
    """Two ways that should compute the same function do not."""


def deviation(result: torch.Tensor, expected: torch.Tensor, most: float, what: str) -> float:
    """Norm of the difference over the norm of what is expected.

    Raises:
        DisagreementError: it is more than `most`.
    """
    difference = result.detach().double() - expected.detach().double()
    relative = float(difference.norm() / expected.detach().double().norm())
    if not relative <= most:
        raise DisagreementError(f"{what}: deviates by {relative:.1e} from ours, and {most:.0e} are allowed")
    return relative
