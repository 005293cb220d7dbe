"""Scores of neurons on planted and random activations, and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from megamoe.analyze import predictivity as module
from megamoe.analyze.predictivity import Ranking, predictivity, shuffled

LABELS = np.arange(40) < 12


def score(activations_W, labels_W=LABELS):
    [[found]] = predictivity(np.asarray(activations_W, float)[None], labels_W[None])
    return found


def test_planted_neurons():
    assert score(LABELS) == 1
    assert score(~LABELS) == 1
    assert score(np.full(40, 3.0)) == pytest.approx(28 / 40)
    assert score(np.full(40, 3.0), ~LABELS) == pytest.approx(28 / 40)
    assert score(np.zeros(40), np.arange(40) < 20) == pytest.approx(0.5)


@given(
    activations=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0, 7.0]), min_size=2, max_size=60),
    data=st.data(),
)
def test_average_precision_is_scikit_learns_with_heavy_ties(activations, data):
    n = len(activations)
    n_positive = data.draw(st.integers(1, n - 1))
    labels = np.array(data.draw(st.permutations([True] * n_positive + [False] * (n - n_positive))))
    [positive], [negative] = Ranking(np.array([activations])).average_precisions(labels)
    assert positive == pytest.approx(average_precision_score(labels, activations), abs=1e-12)
    assert negative == pytest.approx(average_precision_score(~labels, activations), abs=1e-12)


def test_all_neurons_and_labellings_at_once(monkeypatch):
    monkeypatch.setattr(module, "NEURONS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    activations_UW = np.maximum(rng.standard_normal((20, 40)).round(1), 0)
    labels_RW = shuffled(LABELS, 3, rng)
    expected = [
        [max(average_precision_score(y, a), average_precision_score(~y, a)) for a in activations_UW]
        for y in labels_RW
    ]
    assert predictivity(activations_UW, labels_RW) == pytest.approx(np.array(expected), abs=1e-12)


def test_shuffling_keeps_the_labels():
    found = shuffled(LABELS, 50, np.random.default_rng(0))
    assert (found.sum(1) == LABELS.sum()).all()
    assert len(np.unique(found, axis=0)) == 50


def test_the_best_of_many_neurons_of_noise_is_far_above_a_half():
    """The bias that the baseline is for: 3072 neurons, 400 samples."""
    rng = np.random.default_rng(0)
    best = predictivity(rng.random((3072, 400)), (np.arange(400) < 200)[None]).max()
    assert 0.60 < best < 0.65
