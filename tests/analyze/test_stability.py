"""Rank correlations between checkpoints."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from megamoe.analyze.stability import spearman, stability

RNG = np.random.default_rng(0)
SCORES_CQLU = RNG.random((3, 2, 2, 24)).round(1)


def test_it_is_spearmans_with_ties():
    expected = np.mean(
        [spearmanr(SCORES_CQLU[0, q, i], SCORES_CQLU[2, q, i]).statistic for q in range(2) for i in range(2)]
    )
    assert spearman(SCORES_CQLU)[0, 2] == pytest.approx(expected)


def test_the_same_checkpoint_twice():
    found = stability(np.repeat(SCORES_CQLU[:1], 2, axis=0), 4, 5, RNG)
    for matrix in found.values():
        assert matrix == pytest.approx(np.ones((2, 2)))


def test_experts_that_keep_their_scores_while_neurons_swap_within_them():
    """The neurons' order is random within experts and fixed between them."""
    experts_E = np.arange(6.0)
    noise_CU = RNG.random((2, 6 * 20))
    scores_CQLU = (np.repeat(experts_E, 20) + 8 * noise_CU).reshape(2, 1, 1, -1)
    found = {name: matrix[0, 1] for name, matrix in stability(scores_CQLU, 6, 20, RNG).items()}
    assert found["experts"] > 0.8 > found["neurons"]
    assert found["experts"] > found["random"]


def test_equal_scores_have_no_ranks_and_are_left_out():
    scores = SCORES_CQLU.copy()
    scores[0, 0] = 0.5
    assert spearman(scores)[0, 2] == pytest.approx(
        np.mean([spearmanr(scores[0, 1, i], scores[2, 1, i]).statistic for i in range(2)])
    )
    assert np.isnan(spearman(np.ones((2, 1, 1, 5)))).all()
