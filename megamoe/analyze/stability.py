"""When in training neurons and experts settle on their functions.

For two checkpoints, Spearman's rank correlation of the scores of a layer's neurons, of its experts (means
over their neurons), and of groups of the same size drawn at random; averaged over functions and layers.
Means of many neurons are steadier than single ones whatever the groups, so experts count as settling first
where they are above the random groups, not where they are above the neurons.

Paper: Zhang et al., Findings of ACL 2023, arXiv 2305.18390.

Shapes: C checkpoints, Q functions, L mixture layers, U neurons of a layer, E experts.
"""

import numpy as np
from scipy.stats import rankdata

from megamoe.analyze.experts import expert_scores, random_partitions
from megamoe.analyze.predictivity import Floats


def stability(
    scores_CQLU: Floats, n_experts: int, n_partitions: int, rng: np.random.Generator
) -> dict[str, Floats]:
    """Correlations [C, C] of "neurons", "experts" and "random" groups, of which `n_partitions` are drawn."""
    partitions = random_partitions(scores_CQLU.shape[-1], n_partitions, rng)
    random = [spearman(expert_scores(scores_CQLU[..., order_U], n_experts)) for order_U in partitions]
    return {
        "neurons": spearman(scores_CQLU),
        "experts": spearman(expert_scores(scores_CQLU, n_experts)),
        "random": np.mean(random, axis=0),
    }


def spearman(values_CQLX: Floats) -> Floats:
    """Rank correlation [C, C] of the last axis, averaged over functions and layers.

    Vectors of equal numbers, which have none, are left out; NaN if all are.
    """
    ranks = rankdata(values_CQLX, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=-1, keepdims=True)
    ranks = np.divide(ranks, norms, out=np.full_like(ranks, np.nan), where=norms > 0)
    correlations_CCQL = np.einsum("cqlx,dqlx->cdql", ranks, ranks)
    counted = np.isfinite(correlations_CCQL).sum((2, 3))
    return np.divide(
        np.nansum(correlations_CCQL, axis=(2, 3)),
        counted,
        out=np.full(counted.shape, np.nan),
        where=counted > 0,
    )
