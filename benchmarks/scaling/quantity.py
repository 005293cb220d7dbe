"""A piece of one rank's own work, while one size grows and the others stay."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

Action = Callable[[], Any]
When = Literal["layer", "step", "start", "checkpoint"]

MEGAMOE, DEEPSPEED, POLICY = "megamoe", "DeepSpeed and torch", "the policy's arithmetic"


@dataclass(frozen=True)
class Quantity:
    """What is measured.

    Attributes:
        name: what is done.
        when: "layer" in each mixture layer of each step, "step" once in it or with a line of the log,
            "start" once in a run, "checkpoint" with each save or load.
        size: what grows: "T" tokens of a rank, "E" experts of a layer, "R" expert-parallel ranks, "W" ranks,
            or something else in words.
        values: of the size, rising.
        at: makes the work at one value, which can be done again and again; making it does not count.
        beside: the other sizes.
        owner: whose code does most of it.
    """

    name: str
    when: When
    size: str
    values: tuple[int, ...]
    at: Callable[[int], AbstractContextManager[Action]]
    beside: Mapping[str, int]
    owner: str = MEGAMOE


@dataclass(frozen=True)
class Sizes:
    """How far sizes grow, and what they are while another grows.

    Attributes:
        tokens: T of a rank.
        experts: E of a layer.
        ep_sizes: R, ranks that share one set of experts.
        worlds: W, ranks of the run.
        engines: W of those for which an engine is built.
        tensors: of a checkpoint.
        checkpoints: that a run has kept.
        sentences: of a labelled set.
        n_tokens: T where another size grows.
        n_experts: E there.
        ep_size: R there.
        n_ranks: W there.
        n_tensors: of a checkpoint there.
        step: preset whose training step is the measure of what is done in every step.
        seconds: CPU time for which each point is measured at least.
    """

    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    ep_sizes: tuple[int, ...]
    worlds: tuple[int, ...]
    engines: tuple[int, ...]
    tensors: tuple[int, ...]
    checkpoints: tuple[int, ...]
    sentences: tuple[int, ...]
    n_tokens: int
    n_experts: int
    ep_size: int
    n_ranks: int
    n_tensors: int
    step: str
    seconds: float


def doubling(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """`first`, `factor` times that, and so on up to `last`."""
    values = [first]
    while values[-1] * factor <= last:
        values.append(values[-1] * factor)
    return tuple(values)


FULL = Sizes(
    tokens=doubling(1024, 65536), experts=doubling(16, 4096), ep_sizes=doubling(2, 4096),
    worlds=doubling(8, 4096), engines=doubling(8, 4096), tensors=doubling(8, 512),
    checkpoints=doubling(2, 64), sentences=doubling(8192, 524288),
    n_tokens=2048, n_experts=64, ep_size=64, n_ranks=64, n_tensors=8, step="small_enwik8", seconds=0.1,
)  # fmt: skip
QUICK = Sizes(
    tokens=doubling(256, 2048), experts=doubling(8, 64), ep_sizes=doubling(2, 16), worlds=doubling(4, 32),
    engines=doubling(2, 8, 4), tensors=doubling(2, 16), checkpoints=doubling(2, 8),
    sentences=doubling(64, 512),
    n_tokens=256, n_experts=16, ep_size=4, n_ranks=4, n_tensors=2, step="tiny_enwik8", seconds=0.0,
)  # fmt: skip
