"""Information between labels and experts, in bits."""

import numpy as np
import pytest

from megamoe.analyze.mutual_information import mutual_information

LABELS = np.arange(8) < 4


def test_a_router_that_knows_the_label_tells_one_bit():
    choices_WE = np.where(LABELS[:, None], [5, 0, 0], [0, 3, 2])
    assert mutual_information(choices_WE, LABELS[None]) == pytest.approx([1.0])


def test_a_router_that_does_not_look_tells_nothing():
    choices_WE = np.tile([4, 1, 0], (8, 1))
    assert mutual_information(choices_WE, LABELS[None]) == pytest.approx([0.0])
    assert mutual_information(0 * choices_WE, LABELS[None]) == pytest.approx([0.0])


def test_every_labelling_by_the_definition():
    rng = np.random.default_rng(0)
    choices_WE = rng.integers(0, 9, (8, 3))
    labels_RW = rng.permuted(np.tile(LABELS, (4, 1)), axis=1)
    for labels_W, found in zip(labels_RW, mutual_information(choices_WE, labels_RW), strict=True):
        joint = np.array([choices_WE[~labels_W].sum(0), choices_WE[labels_W].sum(0)]) / choices_WE.sum()
        alone = joint.sum(1, keepdims=True) * joint.sum(0)
        assert found == pytest.approx((joint * np.log2(joint / alone)).sum())
