"""A planted functional expert is found, and nothing under labels that mean nothing."""

from dataclasses import replace

import numpy as np
import pytest

from megamoe.analyze.findings import find
from megamoe.analyze.functions import Function
from megamoe.analyze.settings import Settings

E, F, W = 8, 32, 120
LABELS = np.arange(W) < W // 2
FUNCTION = Function("planted", np.arange(W), LABELS)
SETTINGS = Settings(top_share=0.1, shuffles=40, partitions=40)


def planted():
    """Noise, in which expert 5 knows the label, and so does the router."""
    rng = np.random.default_rng(0)
    maxima_UW = rng.random((E * F, W)).astype(np.float32)
    maxima_UW[5 * F : 6 * F] += 0.8 * LABELS
    choices_WE = rng.integers(0, 5, (W, E))
    choices_WE[LABELS, 5] += 5
    return maxima_UW, choices_WE


def test_a_planted_expert_is_found():
    found, scores_U = find(*planted(), FUNCTION, SETTINGS, np.random.default_rng(1))
    assert found.functional == [5]
    assert found.counts[5] == found.n_top == 25
    assert found.degree == 25 / F
    assert found.best_p == found.information_p == pytest.approx(1 / 41)
    assert found.best == scores_U.max() > found.best_chance + 0.2
    assert found.above == F
    assert np.argmax(found.expert_scores) == 5
    assert found.functional_random < 0.1
    assert found.information > 10 * found.information_chance


def test_shuffled_labels_find_nothing():
    rng = np.random.default_rng(2)
    maxima_UW, choices_WE = planted()
    found = [
        find(maxima_UW, choices_WE, replace(FUNCTION, labels=rng.permutation(LABELS)), SETTINGS, rng)[0]
        for _ in range(20)
    ]
    assert sum(one.best_p <= 0.05 for one in found) <= 4  # 1 on average
    assert sum(one.information_p <= 0.05 for one in found) <= 4
    assert np.mean([one.above > 0 for one in found]) <= 0.2
    assert np.mean([one.best - one.best_chance for one in found]) == pytest.approx(0, abs=0.02)


def test_neurons_that_fire_together_gather_by_chance_and_shuffled_labels_show_it():
    """The test takes neurons for independent; where an expert's are not, its level does not hold."""
    rng = np.random.default_rng(3)
    together_UW = np.repeat(rng.random((E, W)), F, axis=0) + 0.05 * rng.random((E * F, W))
    found, _ = find(together_UW, np.ones((W, E), int), FUNCTION, SETTINGS, rng)
    assert found.functional_chance > 0.5
    assert found.functional_random < 0.1


def test_the_same_draws_find_the_same():
    first, second = (find(*planted(), FUNCTION, SETTINGS, np.random.default_rng(1))[0] for _ in range(2))
    assert first == second
