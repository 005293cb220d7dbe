"""Functional experts: thresholds, planted ones, and how often chance makes one."""

import math

import numpy as np
import pytest

from megamoe.analyze.experts import (
    expert_scores,
    gather,
    n_top_neurons,
    random_partitions,
    random_quantile,
    top_neurons,
)


@pytest.mark.parametrize(
    ("n_neurons", "expert_size", "n_top", "threshold"), [(3072, 192, 30, 7), (49152, 3072, 491, 48)]
)
def test_published_thresholds(n_neurons, expert_size, n_top, threshold):
    assert n_top_neurons(n_neurons, 0.01) == n_top
    assert random_quantile(n_neurons, expert_size, n_top, 0.001) == threshold


def test_a_planted_expert_is_the_functional_one():
    rng = np.random.default_rng(0)
    scores_U = rng.random(16 * 32) * 0.5
    scores_U[5 * 32 : 5 * 32 + 20] = 0.9
    found = gather(scores_U, 16, 20, 0.001, rng)
    assert found.functional == [5]
    assert found.counts_E.tolist() == [20 * (e == 5) for e in range(16)]
    assert found.degree == 20 / 32


def test_without_functional_experts_there_is_no_degree():
    scores_U = np.tile(np.linspace(0, 1, 32), 16)
    found = gather(scores_U, 16, 16, 0.001, np.random.default_rng(0))
    assert found.functional == []
    assert found.degree is None


def test_random_partitions_find_functional_experts_at_the_level_of_the_test():
    rng = np.random.default_rng(1)
    alpha, n_experts, n_partitions = 0.05, 8, 1000
    scores_U = rng.random(n_experts * 24)
    found = sum(
        len(gather(scores_U[order_U], n_experts, 30, alpha, rng).functional)
        for order_U in random_partitions(len(scores_U), n_partitions, rng)
    )
    n_tests = n_experts * n_partitions
    assert 0 < found / n_tests <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / n_tests)


def test_equal_scores_favour_no_expert():
    rng = np.random.default_rng(2)
    owners = np.concatenate([top_neurons(np.ones(64), 16, rng) // 16 for _ in range(500)])
    assert np.bincount(owners) == pytest.approx(2000, rel=0.1)


def test_reordering_neurons_within_an_expert_leaves_its_score():
    rng = np.random.default_rng(3)
    scores_U = rng.random(4 * 6)
    reordered_U = rng.permuted(scores_U.reshape(4, 6), axis=1).ravel()
    assert (scores_U != reordered_U).any()
    assert expert_scores(scores_U, 4) == pytest.approx(expert_scores(reordered_U, 4))
    assert expert_scores(scores_U, 4)[2] == pytest.approx(scores_U[12:18].mean())
