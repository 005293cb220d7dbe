"""Functional experts: those in which the neurons of a function gather.

Of the U neurons of a layer, the K most predictive ones are the function's. If they were placed at random,
expert e with its F neurons would hold c_e of them, hypergeometric in (U, F, K). It is functional if c_e > t,
the 1 - alpha quantile of that. The modularisation degree is the mean of c_e / F over the functional
experts; an expert at random has K / U.

Paper: Zhang et al., Findings of ACL 2023, arXiv 2305.18390.

Shapes: R rows of scores or partitions, U neurons of a layer, E experts, K neurons of a function.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

from megamoe.analyze.predictivity import Floats

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Gathering:
    """How a function's neurons spread over the experts of a layer.

    Attributes:
        counts_E: its neurons in each expert, c.
        threshold: t; an expert with more is functional.
        expert_size: neurons of an expert, F.
    """

    counts_E: Ints
    threshold: int
    expert_size: int

    @property
    def functional(self) -> list[int]:
        """Ids of the functional experts."""
        return np.flatnonzero(self.counts_E > self.threshold).tolist()

    @property
    def degree(self) -> float | None:
        """The modularisation degree; None without functional experts."""
        return float(self.counts_E[self.functional].mean() / self.expert_size) if self.functional else None


def gather(scores_U: Floats, n_experts: int, n_top: int, alpha: float, rng: np.random.Generator) -> Gathering:
    """Count the `n_top` most predictive neurons of a layer expert by expert.

    Args:
        scores_U: predictivities, expert by expert.
        n_experts: experts E.
        n_top: neurons K of a function.
        alpha: level of the test.
        rng: decides between neurons of equal scores, which else the first experts would get.
    """
    expert_size = len(scores_U) // n_experts
    owners_K = top_neurons(scores_U, n_top, rng) // expert_size
    threshold = random_quantile(len(scores_U), expert_size, n_top, alpha)
    return Gathering(np.bincount(owners_K, minlength=n_experts), threshold, expert_size)


def n_top_neurons(n_neurons: int, share: float) -> int:
    """K = floor(share * U), at least one."""
    return max(1, int(share * n_neurons))


def top_neurons(scores_U: Floats, n_top: int, rng: np.random.Generator) -> Ints:
    """The neurons of the largest scores, the largest first; equal ones in a drawn order."""
    return np.lexsort((rng.random(len(scores_U)), -scores_U))[:n_top]


@cache
def random_quantile(n_neurons: int, expert_size: int, n_top: int, alpha: float) -> int:
    """t, the smallest number that a random expert's count exceeds with a probability of at most alpha."""
    return int(hypergeom.ppf(1 - alpha, n_neurons, expert_size, n_top))


def random_partitions(n_neurons: int, n: int, rng: np.random.Generator) -> Ints:
    """`n` random orders of the neurons, [n, U]: the first F of a row are its first expert, and so on."""
    return rng.permuted(np.tile(np.arange(n_neurons), (n, 1)), axis=1)


def expert_scores(scores_RU: Floats, n_experts: int) -> Floats:
    """The predictivity of experts: the mean over the neurons of each, [R, E]."""
    return scores_RU.reshape(*scores_RU.shape[:-1], n_experts, -1).mean(-1)
