"""The experts of one layer, of which as many are on the device as there are slots for.

Whoever computes asks for one expert after another (`fetch`) and gets it always, from its slot or, on a miss,
from the files. A loader in the background (`load_expected`) brings experts that will probably be needed;
whatever it does changes how long `fetch` takes and never what it gives.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from megamoe.moe.mixture import Weights
from megamoe.serve.device_link import DeviceLink
from megamoe.serve.replacement import Fifo, choose_victim
from megamoe.serve.stored_experts import StoredExperts

NONE = -1
"""In the place of an expert."""


@dataclass
class Traffic:
    """What happened so far.

    Attributes:
        hits: experts that were in a slot when they were needed.
        late: experts that were on their way.
        misses: experts that had to be fetched.
        loads: experts copied to a slot, needed or not.
        evictions: experts that lost their slot.
        n_bytes: bytes of all copies.
        stall: seconds that computing waited for copies.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    n_bytes: int = 0
    stall: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that computing did not have to fetch itself; 1 if none was needed."""
        needed = self.hits + self.late + self.misses
        return (self.hits + self.late) / needed if needed else 1.0


class ExpertSlots:
    """S slots for the experts of a layer.

    Args:
        stored: the experts in the files.
        n_slots: S, at least 1.
        policy: which expert makes room.
        device: where the slots are.
        wake_loader: called when there is something to load in the background; None loads on demand only.

    Attributes:
        traffic: counts since the start.
        calls: if a list, the experts that each call needed are appended.
    """

    def __init__(
        self,
        stored: StoredExperts,
        n_slots: int,
        policy: Fifo,
        device: torch.device,
        wake_loader: Callable[["ExpertSlots"], None] | None = None,
    ) -> None:
        self.stored, self.policy, self._wake_loader = stored, policy, wake_loader
        self.n_slots = n_slots
        self._slots = stored.empty(n_slots, device)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(n_slots))
        self._arriving: set[int] = set()
        self._in_use = NONE
        self._needed: set[int] = set()
        self._calling = False
        self._expected: deque[tuple[int, ...]] = deque()
        # Guards everything above; told whenever a copy has ended.
        self._changed = threading.Condition()
        self._link = DeviceLink(device)
        self.traffic = Traffic()
        self.calls: list[tuple[int, ...]] | None = None

    def expect(self, experts: Iterable[int]) -> None:
        """Announce what one more call will probably need, the most probable first.

        The k-th announcement is for the k-th call from now on. Its experts are loaded when the call before
        it has ended, so that they take no slot that this one still needs.
        """
        with self._changed:
            self._expected.append(tuple(experts))
        self._wake()

    @contextmanager
    def call(self, needed: Collection[int]) -> Iterator[Callable[[int], Weights]]:
        """One call of the layer.

        Args:
            needed: the experts that will be fetched, each once and in rising order.

        Yields:
            `fetch`, which gives the parameters of an expert. They are valid until it is called again.
        """
        if self.calls is not None:
            self.calls.append(tuple(sorted(needed)))
        with self._changed:
            self._calling, self._needed = True, set(needed)
            if self._expected:  # from here on it is known better
                self._expected.popleft()
        try:
            yield self.fetch
        finally:
            with self._changed:
                self._release()
                self._calling, self._needed = False, set()
            self._wake()

    def fetch(self, expert: int) -> Weights:
        """The parameters of an expert, loaded if they are in no slot."""
        begin = time.perf_counter()
        with self._changed:
            self._release()
            is_late = expert in self._arriving
            self._changed.wait_for(lambda: expert not in self._arriving)
            self._in_use = expert
            is_miss = expert not in self._slot_of  # the loader may also have failed
            if is_miss:
                self._changed.wait_for(lambda: self._take_slot(expert, self._needed))
        if is_miss:
            self._copy(expert)
        with self._changed:
            self.policy.used(expert)
            self._needed.discard(expert)
            if is_miss:
                self.traffic.misses += 1
            elif is_late:
                self.traffic.late += 1
            else:
                self.traffic.hits += 1
            if is_miss or is_late:
                self.traffic.stall += time.perf_counter() - begin
            return self._slots.of(self._slot_of[expert])

    def load_expected(self) -> None:
        """Load what the next call is expected to need, as far as slots can be had; by the loader alone."""
        with self._changed:
            expected = self._next_expected()
        for expert in expected:
            with self._changed:
                if self._next_expected() is not expected:
                    return  # the call has begun without it
                if expert in self._slot_of or not self._take_slot(expert, (), kept=expected):
                    continue
            self._copy(expert)

    def _next_expected(self) -> tuple[int, ...]:
        """What the next call is expected to need, while no call needs the slots."""
        return self._expected[0] if self._expected and not self._calling else ()

    def _wake(self) -> None:
        if self._wake_loader is not None and self._next_expected():
            self._wake_loader(self)

    def _take_slot(self, expert: int, needed: Collection[int], kept: Collection[int] = ()) -> bool:
        """Give an expert a slot that its copy is under way to, if one can be had."""
        if not self._free:
            victim = choose_victim(self.policy, needed, {*kept, *self._arriving, self._in_use})
            if victim is None:
                return False
            self._evict(victim)
            self.traffic.evictions += 1
        self._slot_of[expert] = self._free.pop()
        self._arriving.add(expert)
        self.policy.came(expert)
        return True

    def _evict(self, expert: int) -> None:
        self._free.append(self._slot_of.pop(expert))
        self.policy.went(expert)

    def _copy(self, expert: int) -> None:
        slot, arrived = self._slot_of[expert], False
        try:
            self._link.load(self.stored, expert, self._slots.of(slot), slot)
            arrived = True
        finally:
            with self._changed:
                self._arriving.remove(expert)
                if arrived:
                    self.traffic.loads += 1
                    self.traffic.n_bytes += self.stored.n_bytes
                else:
                    self._evict(expert)
                self._changed.notify_all()

    def _release(self) -> None:
        """The expert that was fetched last has been computed."""
        if self._in_use in self._slot_of:
            self._link.used(self._slot_of[self._in_use])
        self._in_use = NONE
        self._changed.notify_all()
