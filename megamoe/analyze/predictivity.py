"""How well single neurons tell a function: average precision, against chance.

The predictivity of a neuron with activations a on samples with labels y in {0, 1} is

    s = max(AP(y, a), AP(1 - y, a)),   AP(y, a) = sum_i (R_i - R_(i-1)) P_i

where P_i and R_i are precision and recall among the samples with a at or above the i-th largest value. A
neuron that knows nothing is at max(p, 1 - p), p the share of y = 1, but the best of many such neurons is
well above it. How far, shuffled labels tell.

Paper: Zhang et al., Findings of ACL 2023, arXiv 2305.18390.

Shapes: U neurons, W samples, R labellings.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]

NEURONS_AT_ONCE = 256
"""What is computed for one labelling stays in the cache of a core."""


def predictivity(activations_UW: Floats, labels_RW: Labels) -> Floats:
    """s of every neuron under every labelling, [R, U].

    Args:
        activations_UW: finite numbers, of which many may be equal.
        labels_RW: each with both labels.
    """
    parts = []
    for start in range(0, len(activations_UW), NEURONS_AT_ONCE):
        ranking = Ranking(activations_UW[start : start + NEURONS_AT_ONCE])
        parts.append(np.stack([np.maximum(*ranking.average_precisions(labels)) for labels in labels_RW]))
    return np.concatenate(parts, axis=1)


def shuffled(labels_W: Labels, n: int, rng: np.random.Generator) -> Labels:
    """`n` random orders of the labels, [n, W]."""
    return rng.permuted(np.tile(labels_W, (n, 1)), axis=1)


class Ranking:
    """The samples in falling order of activation, neuron by neuron: sorted once for any number of labellings.

    Equal activations, as the zeros of the ReLU, are one threshold: precision counts at the last of them.
    """

    def __init__(self, activations_UW: Floats) -> None:
        n_samples = activations_UW.shape[1]
        self._order_UW = np.argsort(-activations_UW, axis=1, kind="stable")
        falling_UW = np.take_along_axis(activations_UW, self._order_UW, axis=1)
        is_last_UW = np.ones(falling_UW.shape, bool)
        is_last_UW[:, :-1] = falling_UW[:, :-1] != falling_UW[:, 1:]
        place_UW = np.where(is_last_UW, np.arange(n_samples), n_samples)
        self._last_UW = np.minimum.accumulate(place_UW[:, ::-1], axis=1)[:, ::-1]

    def average_precisions(self, labels_W: Labels) -> tuple[Floats, Floats]:
        """AP(y, a) and AP(1 - y, a) of every neuron, [U] each."""
        labels_UW = labels_W[self._order_UW]
        precision_UW = labels_UW.cumsum(axis=1) / np.arange(1, len(labels_W) + 1)
        precision_UW = np.take_along_axis(precision_UW, self._last_UW, axis=1)
        n_positive = labels_W.sum()
        of_positive_U = (precision_UW * labels_UW).sum(1) / n_positive
        of_negative_U = ((1 - precision_UW) * ~labels_UW).sum(1) / (len(labels_W) - n_positive)
        return of_positive_U, of_negative_U
