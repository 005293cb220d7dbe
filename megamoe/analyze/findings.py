"""What is found of one function in one mixture layer.

Shapes: U neurons of the layer, W samples, E experts, R labellings of which the first is the true one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.analyze.experts import expert_scores, gather, n_top_neurons, random_partitions
from megamoe.analyze.functions import Function
from megamoe.analyze.mutual_information import mutual_information
from megamoe.analyze.predictivity import Floats, predictivity, shuffled
from megamoe.analyze.settings import Settings


@dataclass(frozen=True)
class Finding:
    """One function in one layer; whatever is called chance is a mean over shuffled labels.

    Attributes:
        best: predictivity of the best neuron.
        best_chance: of the best neuron.
        best_p: share of labellings, the true one among them, with at least as good a best neuron.
        above: neurons better than the best one under 95 % of the shuffled labellings.
        counts: the function's neurons in each expert.
        n_top: their number.
        functional: ids of functional experts.
        functional_chance: number of functional experts.
        functional_random: number of functional experts, mean over random partitions of the neurons.
        degree: modularisation degree; None without functional experts.
        expert_scores: mean predictivity of each expert's neurons.
        information: bits that a token's expert tells of the label.
        information_chance, information_p: as of the best neuron.
    """

    best: float
    best_chance: float
    best_p: float
    above: int
    counts: list[int]
    n_top: int
    functional: list[int]
    functional_chance: float
    functional_random: float
    degree: float | None
    expert_scores: list[float]
    information: float
    information_chance: float
    information_p: float


def find(
    maxima_UW: Floats,
    choices_WE: npt.NDArray[np.integer],
    function: Function,
    settings: Settings,
    rng: np.random.Generator,
) -> tuple[Finding, Floats]:
    """Test one function in one layer.

    Args:
        maxima_UW: activations of the function's group of samples.
        choices_WE: where its tokens went.
        function: which samples are asked about what.
        settings: of the tests.
        rng: of labels, partitions, and of the order of equal scores.

    Returns:
        the finding, and the predictivity of every neuron [U].
    """
    n_neurons, n_experts = len(maxima_UW), choices_WE.shape[1]
    n_top = n_top_neurons(n_neurons, settings.top_share)
    labels_RW = np.vstack([function.labels[None], shuffled(function.labels, settings.shuffles, rng)])
    scores_RU = predictivity(maxima_UW[:, function.rows], labels_RW)
    information_R = mutual_information(choices_WE[function.rows], labels_RW)

    def gathered(scores_U: Floats) -> int:
        return len(gather(scores_U, n_experts, n_top, settings.alpha, rng).functional)

    found = gather(scores_RU[0], n_experts, n_top, settings.alpha, rng)
    best_R = scores_RU.max(1)
    partitions = random_partitions(n_neurons, settings.partitions, rng)
    return Finding(
        best=float(best_R[0]),
        best_chance=float(best_R[1:].mean()),
        best_p=_p_value(best_R),
        above=int((scores_RU[0] > np.quantile(best_R[1:], 0.95)).sum()),
        counts=found.counts_E.tolist(),
        n_top=n_top,
        functional=found.functional,
        functional_chance=float(np.mean([gathered(scores_U) for scores_U in scores_RU[1:]])),
        functional_random=float(np.mean([gathered(scores_RU[0][order_U]) for order_U in partitions])),
        degree=found.degree,
        expert_scores=expert_scores(scores_RU[0], n_experts).tolist(),
        information=float(information_R[0]),
        information_chance=float(information_R[1:].mean()),
        information_p=_p_value(information_R),
    ), scores_RU[0]


def _p_value(values_R: Floats) -> float:
    """Of a permutation test in which large values count."""
    return float((values_R >= values_R[0]).mean())
