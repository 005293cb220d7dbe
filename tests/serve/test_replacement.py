import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.serve.replacement import POLICIES, Belady, Fifo, Lfu, Lru, choose_victim, count_misses

A, B, C, D = range(4)
ONE_BY_ONE = [[A], [B], [C], [A], [D], [A]]
CALLS = st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=4), max_size=30)


def test_fifo_forgets_what_is_used_and_lru_does_not() -> None:
    assert count_misses(ONE_BY_ONE, 3, Fifo()) == 5  # A B C D A
    assert count_misses(ONE_BY_ONE, 3, Lru()) == 4  # A B C D
    assert count_misses(ONE_BY_ONE, 3, Belady(ONE_BY_ONE)) == 4


def test_lfu_keeps_what_is_used_often() -> None:
    calls = [[A], [A], [B], [C], [A], [B]]
    assert count_misses(calls, 2, Lfu()) == 4  # A B C B
    assert count_misses(calls, 2, Lru()) == 5  # A B C A B


@given(calls=CALLS, n_slots=st.integers(1, 7))
def test_none_is_better_than_belady(calls: list[set[int]], n_slots: int) -> None:
    fewest = count_misses(calls, n_slots, Belady(calls))
    for policy in POLICIES.values():
        assert count_misses(calls, n_slots, policy()) >= fewest
    if n_slots == 7:
        assert fewest == len(set().union(*calls))


def brute_force(accesses: list[int], n_slots: int) -> int:
    """The fewest misses of any choice of victims."""
    states = {frozenset[int](): 0}
    for expert in accesses:
        following: dict[frozenset[int], int] = {}
        for held, misses in states.items():
            if expert in held:
                options = [(held, misses)]
            elif len(held) < n_slots:
                options = [(held | {expert}, misses + 1)]
            else:
                options = [(held - {victim} | {expert}, misses + 1) for victim in held]
            for state, count in options:
                following[state] = min(count, following.get(state, count))
        states = following
    return min(states.values())


@given(
    calls=st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3), max_size=8), n_slots=st.integers(1, 4)
)
def test_belady_is_the_optimum(calls: list[set[int]], n_slots: int) -> None:
    accesses = [expert for needed in calls for expert in sorted(needed)]
    assert count_misses(calls, n_slots, Belady(calls)) == brute_force(accesses, n_slots)


@pytest.mark.parametrize(
    ("needed", "kept", "victim"),
    [((), (), A), ((A,), (), B), ((A, B, C), (), C), ((), (A, B), C), ((), (A, B, C), None)],
)
def test_who_makes_room(needed: tuple[int, ...], kept: tuple[int, ...], victim: int | None) -> None:
    policy = Fifo()
    for expert in (A, B, C):
        policy.came(expert)
    assert choose_victim(policy, needed, kept) == victim
