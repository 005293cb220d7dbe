"""What speed and memory have to be, as ratios, and whether they are."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.side_by_side import attention, engine, evaluation, layer, memory, step
from benchmarks.side_by_side.sizes import Sizes
from benchmarks.side_by_side.timing import Case

HIGHER, LOWER = "at least", "at most"


@dataclass(frozen=True)
class Goal:
    """A ratio of two ways of one case.

    Attributes:
        name: what it is about.
        must: the bound.
        stretch: the bound that would be better still.
        section: of the case.
        over: the way above the line.
        under: the way below it.
        settings: of the case; the first that has them counts.
        direction: `HIGHER` or `LOWER`.
        less_over: a way whose figure is first taken from `over`'s.
        less_under: the same for `under`.
    """

    name: str
    must: float
    stretch: float
    section: str
    over: str
    under: str
    settings: dict[str, Any] = field(default_factory=dict)
    direction: str = HIGHER
    less_over: str = ""
    less_under: str = ""

    def judge(self, cases: Sequence[Case]) -> dict[str, Any]:
        """The goal with what was measured: ratio of medians, ratio of minima, and a verdict on the first."""
        case = next((case for case in cases if case.matches(self.section, self.settings)), None)
        judged: dict[str, Any] = {
            "goal": self.name, "direction": self.direction, "must": self.must, "stretch": self.stretch,
            "median": None, "minimum": None, "verdict": "not measured",
        }  # fmt: skip
        if case is None or not {self.over, self.under} <= case.values.keys():
            return judged
        median, minimum = (self._ratio(case, of) for of in (statistics.median, min))
        return judged | {"median": median, "minimum": minimum, "verdict": self._verdict(median)}

    def _ratio(self, case: Case, of: Callable[[Iterable[float]], float]) -> float:
        over = case.figure(self.over, self.less_over, of)
        return over / case.figure(self.under, self.less_under, of)

    def _verdict(self, ratio: float) -> str:
        sign = 1 if self.direction == HIGHER else -1
        if sign * ratio >= sign * self.stretch:
            return "stretch"
        return "met" if sign * ratio >= sign * self.must else "MISSED"


def goals(sizes: Sizes) -> list[Goal]:
    """All of them."""
    return [
        *_step_goals(sizes),
        *_attention_goals(),
        *_layer_goals(sizes),
        Goal("evaluation at all k in one pass over a pass for each k", 1.0, 0.95, evaluation.SECTION,
             evaluation.ONE_PASS, evaluation.SEPARATE, direction=LOWER),
        *_memory_goals(sizes),
        *_engine_goals(sizes),
    ]  # fmt: skip


def _step_goals(sizes: Sizes) -> list[Goal]:
    small = {"model": sizes.small.name}
    found = [
        Goal(f"whole step, {dtype}, over the published algorithm", must, stretch, step.SECTION,
             step.PUBLISHED, step.OURS.format(dtype), small)
        for dtype, must, stretch in (("fp32", 3.0, 3.5), ("bf16", 5.5, 7.0))
    ]  # fmt: skip
    floors = (("fp32", step.OURS, 1.4, 1.25), ("bf16", step.COMPILED, 2.1, 1.5))
    found += [
        Goal(f"whole step, {way.format(dtype).removeprefix('ours, ')}, over bare products and Adam", must,
             stretch, step.SECTION, way.format(dtype), step.FLOOR.format(dtype), small, LOWER)
        for dtype, way, must, stretch in floors
    ]  # fmt: skip
    return [
        *found,
        Goal("whole step, bf16, compiled kernels, over the published algorithm", 11.0, 16.0, step.SECTION,
             step.PUBLISHED, step.COMPILED.format("bf16"), small),
        Goal("whole step, generated router over linear router", 1.01, 1.0, step.SECTION, step.HYPER,
             step.LINEAR, small, LOWER),
    ]  # fmt: skip


def _attention_goals() -> list[Goal]:
    return [
        Goal(f"attention without projections, {dtype}, over the classic form", must, stretch,
             attention.SECTION, attention.CLASSIC, attention.OURS, {"dtype": dtype},
             less_over=attention.CLASSIC_PROJECTIONS, less_under=attention.PROJECTIONS)
        for dtype, must, stretch in (("fp32", 5.9, 6.5), ("bf16", 8.5, 12.0))
    ]  # fmt: skip


def _layer_goals(sizes: Sizes) -> list[Goal]:
    """Against DeepSpeed with dropout, and without it, where torch's slow dropout does not help us."""
    places = (("balanced", 2, 1.1, 1.8), ("balanced", 8, 1.2, 1.8), ("skewed", 2, 3.0, 5.0))
    found = []
    for routing, top_k, must, stretch in places:
        settings = {"tokens": sizes.goal_tokens, "top_k": top_k, "routing": routing, "dtype": "bf16"}
        for over, under, dropout in (
            (layer.DEEPSPEED, layer.OURS, "dropout on both sides"),
            (layer.PLAIN_DEEPSPEED, layer.PLAIN_OURS, "no dropout"),
        ):
            name = f"layer, bf16, over DeepSpeed's, {routing}, k = {top_k}, {dropout}"
            found.append(Goal(name, must, stretch, layer.SECTION, over, under, settings))
    settings = {"tokens": sizes.goal_tokens, "top_k": 8, "routing": "balanced", "dtype": "bf16"}
    eager = layer.TRANSFORMERS.format("eager")
    return [
        *found,
        Goal("layer, bf16, over transformers' eager experts of equal FLOPs, k = 8, no dropout", 5.0, 7.0,
             layer.SECTION, eager, layer.PLAIN_OURS, settings),
    ]  # fmt: skip


def _memory_goals(sizes: Sizes) -> list[Goal]:
    kept = {"tokens": sizes.goal_tokens, "top_k": 8, "dtype": "fp32"}
    return [
        Goal("bytes kept by the layer, fp32, k = 8, over fastmoe's with dropout", 0.28, 0.25, memory.SAVED,
             layer.OURS, layer.FASTMOE, kept, LOWER),
        Goal(f"peak of a step at batch {sizes.memory_batch}, bf16, over the published algorithm's", 0.58, 0.5,
             memory.PEAK, step.OURS.format("bf16"), step.PUBLISHED, direction=LOWER),
    ]  # fmt: skip


def _engine_goals(sizes: Sizes) -> list[Goal]:
    bounds = zip(sizes.engines, ((1.2, 1.1), (1.08, 1.05)), strict=True)
    return [
        Goal(f"engine at ZeRO 1 over a plain loop, {work.name}", must, stretch, engine.SECTION,
             engine.ENGINE.format(1), engine.PLAIN, {"model": work.name}, LOWER)
        for work, (must, stretch) in bounds
    ]  # fmt: skip
