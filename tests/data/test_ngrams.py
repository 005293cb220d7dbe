import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.data.ngrams import conditional_entropy, cross_entropy
from megamoe.errors import DataError


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8) - ord("a")


@pytest.mark.parametrize(
    ("text", "order", "expected"),
    [
        ("abab", 0, 1.0),
        ("abab", 1, 0.0),
        # After a: b, c, b (2 of 3 are b); after b: a, a; after c: a. Six pairs in all.
        ("abacaba", 1, 3 / 6 * -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))),
        ("aabbaabb", 2, 0.0),
        ("aaab", 0, -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))),
    ],
)
def test_conditional_entropy_by_hand(text: str, order: int, expected: float) -> None:
    assert conditional_entropy(ids(text), 3, order) == pytest.approx(expected)


def test_cross_entropy_by_hand() -> None:
    """Train "aab", test "ab", three symbols."""
    # Order 0: c(a)=2, c(b)=1, d=2, so p(a) = (2 + 2/3) / 5 and p(b) = (1 + 2/3) / 5.
    p_a, p_b = (2 + 2 / 3) / 5, (1 + 2 / 3) / 5
    assert cross_entropy(ids("aab"), ids("ab"), 3, 0) == pytest.approx(-(math.log2(p_a) + math.log2(p_b)) / 2)
    # Order 1: after a came a and b, so c(a)=2 and d(a)=2; the first test symbol has no context.
    p_b_after_a = (1 + 2 * p_b) / 4
    expected = -(math.log2(p_a) + math.log2(p_b_after_a)) / 2
    assert cross_entropy(ids("aab"), ids("ab"), 3, 1) == pytest.approx(expected)


def test_an_unseen_context_falls_back_to_the_shorter_one() -> None:
    train, test = ids("aaaab"), ids("ca")
    p_c, p_a = (0 + 2 / 3) / 7, (4 + 2 / 3) / 7
    assert cross_entropy(train, test, 3, 1) == pytest.approx(-(math.log2(p_c) + math.log2(p_a)) / 2)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(0, 3))
def test_the_model_is_a_probability_distribution(train: list[int], order: int) -> None:
    """Summed over every text of two symbols, the probabilities that the model gives make 1."""
    total = sum(
        2 ** (-2 * cross_entropy(np.array(train), np.array([a, b]), 4, order))
        for a in range(4)
        for b in range(4)
    )
    assert total == pytest.approx(1)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=80), st.integers(0, 2))
def test_no_model_beats_the_empirical_entropy(text: list[int], order: int) -> None:
    """Knowing more context never raises the entropy, and log2 V bounds it."""
    tokens = np.array(text)
    entropies = [conditional_entropy(tokens[2 - k :], 4, k) for k in range(order + 1)]
    assert all(longer <= shorter + 1e-9 for shorter, longer in pairwise(entropies))
    assert -1e-9 <= entropies[-1] <= entropies[0] <= 2 + 1e-9


@pytest.mark.parametrize("order", [4, 9])
def test_texts_that_are_too_short_are_refused(order: int) -> None:
    with pytest.raises(DataError, match=f"order = {order}"):
        conditional_entropy(ids("abab"), 3, order)
    with pytest.raises(DataError, match=f"order = {order}"):
        cross_entropy(ids("abab"), ids("ab"), 3, order)


def test_an_order_that_overflows_is_refused() -> None:
    with pytest.raises(DataError, match="order = 3: is too high for a vocabulary of 267735"):
        conditional_entropy(np.arange(10), 267_735, 3)
