"""From recorded events to time by room.

Events nest, so that the times that each spends in none below it sum to the time of the steps. What runs
inside `megamoe.moe.rooms.room` belongs to that room. A node of the backward pass runs inside none of them:
it belongs to the room in which its operation ran, which has the same sequence number.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent

from megamoe.moe.rooms import PREFIX

STEP, BACKWARD, OPTIMIZER, DATA, REST, IDLE = "step", "backward", "optimizer", "data", "rest", "idle"
ROOMS = (
    "attention", "routing", "experts", "exchange", "feed_forward", "loss", OPTIMIZER, DATA, REST, IDLE,
)  # fmt: skip
PASSES = ("forward", "backward", "between")
_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATE = _NODE + "torch::autograd::AccumulateGrad"

Times = dict[str, dict[str, float]]
"""Seconds by room and pass."""

Made = dict[tuple[int | None, int], str]
"""The room of an operation by its thread and sequence number."""


class Place(NamedTuple):
    """Where a step is: in which room, and whether in the backward pass."""

    room: str
    backward: bool

    @property
    def in_pass(self) -> str:
        """One of `PASSES`; "between" is before the forward and after the backward pass."""
        if self.backward:
            return "backward"
        return "between" if self.room in (OPTIMIZER, DATA) else "forward"


def time_by_room(events: Iterable[FunctionEvent], n_steps: int, *, on_device: bool) -> Times:
    """Seconds of one step, the mean of `n_steps`, by room; their sum is the time of a step.

    Args:
        events: of the steps, each in a room `STEP`.
        n_steps: how many there are.
        on_device: tell the time of the kernels that rooms start on a device, and the time in which it had
            none as `IDLE`; else that of the process.
    """
    microseconds: Times = {name: dict.fromkeys(PASSES, 0.0) for name in ROOMS}
    whole = 0.0
    for event, place in _placed(events):
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        microseconds[place.room][place.in_pass] += spent
        if event.name == PREFIX + STEP:
            whole += event.time_range.elapsed_us()
    if on_device:
        busy = sum(sum(times.values()) for times in microseconds.values())
        microseconds[IDLE]["between"] = max(0.0, whole - busy)
    return {
        name: {in_pass: time / n_steps / 1e6 for in_pass, time in times.items()}
        for name, times in microseconds.items()
        if sum(times.values()) > 0
    }


def _placed(events: Iterable[FunctionEvent]) -> Iterator[tuple[FunctionEvent, Place]]:
    """The events of the steps, and of the threads that run their backward pass, with their places."""
    places: dict[int, Place] = {}
    made_in: Made = {}
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        place = _place(event, places.get(id(event.cpu_parent)), made_in)
        if place is None:
            continue
        places[id(event)] = place
        if event.sequence_nr >= 0 and not place.backward:
            # Operations without a gradient bear the number of the next one that has one: the last is right.
            made_in[event.thread, event.sequence_nr] = place.room
        yield event, place


def _place(event: FunctionEvent, around: Place | None, made_in: Made) -> Place | None:
    """The place of an event in one that has the place `around`; None outside of steps."""
    if event.name == _ACCUMULATE:  # and DeepSpeed's hooks, which reduce the gradient over ranks
        return Place(OPTIMIZER, backward=True)
    if event.name.startswith(_NODE):
        return Place(made_in.get((event.fwd_thread, event.sequence_nr), REST), backward=True)
    if not event.name.startswith(PREFIX):
        return around
    name = event.name.removeprefix(PREFIX)
    if name == STEP:
        return Place(REST, backward=False)
    if name == BACKWARD:  # apart from its nodes: DeepSpeed's work on gradients
        return Place(OPTIMIZER, backward=True)
    return around and Place(name, around.backward)
