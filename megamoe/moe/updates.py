"""What routing policies learn of a step outside its gradients: balancing biases, running statistics."""

from collections.abc import Sequence

import torch

from megamoe.moe.ranks import Ranks
from megamoe.moe.routing import Router, Routing


@torch.no_grad()
def update_routers(
    routers: Sequence[Router], micro_batches: Sequence[Sequence[Routing]], ranks: Ranks, step: int
) -> None:
    """Give every policy the statistics of the step, after its weights were updated; on all ranks.

    Args:
        routers: of the mixture layers, from below.
        micro_batches: routings of the layers, from below, for each micro-batch of the step.
        ranks: over which statistics are averaged, in one collective for all layers.
        step: optimizer steps done before that one.
    """
    told = [
        (router, torch.stack([routing.statistics for routing in routings if routing.statistics is not None]))
        for router, *routings in zip(routers, *micro_batches, strict=True)
        if routings and routings[0].statistics is not None
    ]
    if not told:
        return
    means = ranks.mean(torch.cat([per_micro_batch.mean(0) for _, per_micro_batch in told]))
    by_owner: dict[Router, list[torch.Tensor]] = {}
    sizes = [per_micro_batch.shape[1] for _, per_micro_batch in told]
    for (router, _), statistics_N in zip(told, means.split(sizes), strict=True):
        by_owner.setdefault(router.owner, []).append(statistics_N)
    for owner, rows in by_owner.items():
        owner.update(torch.stack(rows), step)
