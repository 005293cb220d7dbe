"""Clusters of equal size."""

import torch
from torch.nn.functional import normalize, one_hot

from megamoe.convert.alignment import align
from megamoe.errors import CheckpointError
from megamoe.moe.initialization import generator

_MAX_ROUNDS = 50


def balanced_clusters(rows_ND: torch.Tensor, n_clusters: int, seed: int) -> torch.Tensor:
    """The cluster of each row, [N] int64, N / n_clusters rows in each: k-means on rows of length 1.

    Each round assigns all rows at once at the least total squared distance (a linear assignment with
    N x N costs), then moves the centres to the means; it ends when no row changes its cluster. The sum of
    squared distances never rises.

    Raises:
        CheckpointError: some numbers are not finite.
    """
    if not rows_ND.isfinite().all():
        raise CheckpointError("--by clusters: the weights hold numbers that are not finite")
    directions_ND = normalize(rows_ND.double(), dim=1)
    size = len(rows_ND) // n_clusters
    starts = torch.randperm(len(rows_ND), generator=generator(seed, "clusters"))[:n_clusters]
    centres_CD = directions_ND[starts]
    clusters_N = torch.full((len(rows_ND),), -1)
    seats_N = torch.arange(len(rows_ND)) // size
    for _ in range(_MAX_ROUNDS):
        # Every centre has as many seats as its cluster has rows.
        order_N = align(directions_ND, centres_CD[seats_N])
        previous_N, clusters_N = clusters_N, torch.empty_like(order_N).index_copy_(0, order_N, seats_N)
        if torch.equal(clusters_N, previous_N):
            break
        centres_CD = one_hot(clusters_N, n_clusters).double().T @ directions_ND / size
    return clusters_N
