"""Which expert makes room for another: first in first out, least recently, least frequently used; Belady.

A call of a layer needs a set of experts, which are computed in rising order. Whatever the policy, an expert
that the call does not need any more goes before one that it does, and of these the one needed last goes
first, which is what Belady's optimum does within a call.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence


class Fifo:
    """The expert that came first goes first.

    A policy says of the experts in slots which goes first, next, and last; the others derive from this one.
    """

    def __init__(self) -> None:
        self._residents: dict[int, None] = {}

    def came(self, expert: int) -> None:
        """It has got a slot."""
        self._residents[expert] = None

    def used(self, expert: int) -> None:
        """It is computed, whether it was in a slot before or not."""

    def went(self, expert: int) -> None:
        """It has lost its slot."""
        del self._residents[expert]

    def order(self) -> Iterable[int]:
        """The experts in slots, the first to go first."""
        return list(self._residents)


class Lru(Fifo):
    """The expert that was used the longest time ago goes first."""

    def used(self, expert: int) -> None:
        """It goes last."""
        self._residents[expert] = self._residents.pop(expert)


class Lfu(Fifo):
    """The expert that was used least often goes first; of several, the one that came first."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[int] = Counter()

    def used(self, expert: int) -> None:
        """Count."""
        self._uses[expert] += 1

    def order(self) -> Iterable[int]:
        """By uses."""
        return sorted(self._residents, key=self._uses.__getitem__)


class Belady(Fifo):
    """The expert whose next use is furthest goes first: the fewest misses of all, if the future is known.

    Args:
        calls: the experts that each call will need.

    Paper: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966.
    """

    def __init__(self, calls: Iterable[Collection[int]]) -> None:
        super().__init__()
        self._uses: defaultdict[int, list[int]] = defaultdict(list)
        accesses = [expert for needed in calls for expert in sorted(needed)]
        for time in reversed(range(len(accesses))):
            self._uses[accesses[time]].append(time)

    def used(self, expert: int) -> None:
        """Its next use is the one after this."""
        self._uses[expert].pop()

    def order(self) -> Iterable[int]:
        """By next use."""
        never = float("-inf")
        return sorted(
            self._residents, key=lambda expert: -self._uses[expert][-1] if self._uses[expert] else never
        )


POLICIES = {"fifo": Fifo, "lru": Lru, "lfu": Lfu}


def choose_victim(policy: Fifo, needed: Collection[int], kept: Collection[int] = ()) -> int | None:
    """The expert that loses its slot; None if all are kept.

    Args:
        policy: what to ask.
        needed: experts that go last, the highest of them first.
        kept: experts that do not go at all.
    """
    free = [expert for expert in policy.order() if expert not in kept]
    unneeded = (expert for expert in free if expert not in needed)
    return next(unneeded, max(free, default=None))


def count_misses(calls: Sequence[Collection[int]], n_slots: int, policy: Fifo) -> int:
    """Loads on demand of one layer that makes these calls with `n_slots` slots, empty at first."""
    residents: set[int] = set()
    misses = 0
    for needed in calls:
        for expert in sorted(needed):
            if expert not in residents:
                misses += 1
                if len(residents) == n_slots:
                    victim = choose_victim(policy, [later for later in needed if later > expert])
                    assert victim is not None
                    policy.went(victim)
                    residents.remove(victim)
                policy.came(expert)
                residents.add(expert)
            policy.used(expert)
    return misses
