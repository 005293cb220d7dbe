"""What routing looks like: load, entropy, dead experts, drops, churn.

Everything is measured on the device in one small tensor for all layers, summed over ranks once and
moved to the host once; call it when a line is logged, not at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routing import Routing
from megamoe.moe.selection import choices_per_expert


@dataclass(frozen=True)
class LayerHealth:
    """Routing of one mixture layer over the tokens of all ranks.

    Attributes:
        load: share of the made choices that each expert got, summing to 1 (all 0 if none was made).
        max_over_mean: largest load over mean load; 1 at balance, E if one expert takes all.
        variation: standard deviation of the load over its mean; 0 at balance.
        load_entropy: entropy of the load in nats; ln E at balance.
        router_entropy: mean over tokens of the entropy of softmax(logits) in nats; None without logits.
        dead: experts that got no token.
        drop_rate: share of the choices that the policy gave up again for lack of capacity.
        unrouted: share of tokens that reached no expert at all.
        choices: experts that a token reached on average, which not all policies keep at k.
    """

    load: tuple[float, ...]
    max_over_mean: float
    variation: float
    load_entropy: float
    router_entropy: float | None
    dead: int
    drop_rate: float
    unrouted: float
    choices: float


def routing_health(
    routings: Sequence[Routing],
    n_experts: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = ONE_RANK.mean,
) -> list[LayerHealth]:
    """Measure each mixture layer of one forward pass.

    Args:
        routings: one for each mixture layer, equally many on every rank.
        n_experts: experts E per layer over all ranks.
        sum_over_ranks: sums a tensor over all data-parallel ranks; called once.
    """
    if not routings:
        return []
    sums = sum_over_ranks(torch.stack([_sums(routing, n_experts) for routing in routings]))
    return [
        _layer_health(row, routing.logits_TE is not None)
        for row, routing in zip(sums.double().cpu(), routings, strict=True)
    ]


@torch.no_grad()
def _sums(routing: Routing, n_experts: int) -> torch.Tensor:
    """[4 + E] fp64, additive over ranks: tokens, unrouted tokens, dropped choices, entropy, counts."""
    ids_TK, logits_TE = routing.expert_ids_TK, routing.logits_TE
    zero = torch.zeros((), device=ids_TK.device)
    log_p_TE = logits_TE.log_softmax(-1) if logits_TE is not None else zero
    sums = (
        zero + ids_TK.shape[0],
        (ids_TK < 0).all(1).sum(),
        _dropped(routing) if routing.wanted_TK is not None else zero,
        -(log_p_TE.exp() * log_p_TE).sum(),
    )
    return torch.cat(
        [
            torch.stack([value.double() for value in sums]),
            choices_per_expert(routing.expert_ids_TK, n_experts).double(),
        ]
    )


def _dropped(routing: Routing) -> torch.Tensor:
    """Choices that capacity took back."""
    assert routing.wanted_TK is not None
    return ((routing.wanted_TK >= 0) & (routing.expert_ids_TK < 0)).sum()


def _layer_health(sums: torch.Tensor, has_logits: bool) -> LayerHealth:
    (n_tokens, unrouted, dropped, entropy), counts_E = sums[:4].tolist(), sums[4:]
    made = counts_E.sum().item()
    load_E = counts_E / max(made, 1)
    relative_E = load_E * len(load_E)
    return LayerHealth(
        load=tuple(load_E.tolist()),
        max_over_mean=relative_E.max().item(),
        variation=relative_E.std(correction=0).item(),
        load_entropy=-torch.xlogy(load_E, load_E).sum().item(),
        router_entropy=entropy / n_tokens if has_logits else None,
        dead=int((counts_E == 0).sum()),
        drop_rate=dropped / max(made + dropped, 1),
        unrouted=unrouted / n_tokens,
        choices=made / n_tokens,
    )


def agreement(
    routings: Sequence[Routing], mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = ONE_RANK.mean
) -> float | None:
    """Share of tokens with the same top expert in two mixture layers, one above the other; mean over pairs.

    1 / E for independent routers at balance; None with fewer than two layers.
    """
    if len(routings) < 2:
        return None
    top_LT = torch.stack([_top_expert(routing) for routing in routings])
    return mean_over_ranks((top_LT[1:] == top_LT[:-1]).double().mean()).item()


class Churn:
    """How much routing still moves: the share of a fixed probe's tokens whose top expert changed.

    Route the same probe batch in evaluation mode at each look and hand the routings in.
    """

    def __init__(self) -> None:
        self._previous_LT: torch.Tensor | None = None

    def look(
        self,
        routings: Sequence[Routing],
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = ONE_RANK.mean,
    ) -> list[float] | None:
        """Churn of each mixture layer since the last look, in [0, 1]; None at the first look.

        The top expert of a token is the one with the largest weight, the earlier choice on ties.
        """
        top_LT = torch.stack([_top_expert(routing) for routing in routings])
        previous_LT, self._previous_LT = self._previous_LT, top_LT
        if previous_LT is None:
            return None
        return mean_over_ranks((top_LT != previous_LT).double().mean(1)).tolist()


def _top_expert(routing: Routing) -> torch.Tensor:
    best_T1 = routing.weights_TK.argmax(1, keepdim=True)
    return routing.expert_ids_TK.gather(1, best_T1).squeeze(1)
