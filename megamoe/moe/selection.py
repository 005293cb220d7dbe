"""From scores to choices: what the routing policies share.

Shapes: T tokens, E experts, K choices per token, B sequences.
"""

from dataclasses import replace

import torch

from megamoe.errors import ConfigError
from megamoe.moe.routing import RouterContext, Routing

NO_EXPERT = -1


def check_top_k(top_k: int, n_experts: int) -> None:
    """Refuse a k outside 1..E with the setting's name.

    Raises:
        ConfigError: k is below 1 or above the number of experts.
    """
    if not 1 <= top_k <= n_experts:
        raise ConfigError(f"top_k = {top_k}: give 1 to {n_experts}, the number of experts")


def choose(scores_TE: torch.Tensor, top_k: int, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each token, largest first, and the experts they belong to, both [T, K].

    Args:
        ties: equal scores are to be expected, and the lower expert goes first; else their order is open.

    Raises:
        ConfigError: see `check_top_k`.
    """
    check_top_k(top_k, scores_TE.shape[-1])
    if ties:  # costs more
        sorted_TE, expert_ids_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
        return sorted_TE[:, :top_k], expert_ids_TE[:, :top_k]
    top_TK, expert_ids_TK = scores_TE.topk(top_k, dim=-1)
    return top_TK, expert_ids_TK


def top_k_softmax(logits_TE: torch.Tensor, top_k: int, *, ties: bool = False) -> Routing:
    """Take the k largest logits of each token; weights are the softmax over those k alone.

    Equal to a softmax over all experts renormalised over the chosen ones. At k = 1 the weight is
    exactly 1 and the logits get no gradient from it.
    """
    top_TK, expert_ids_TK = choose(logits_TE, top_k, ties=ties)
    return Routing(expert_ids_TK, torch.softmax(top_TK, dim=-1), logits_TE)


def no_choices(x_TD: torch.Tensor) -> Routing:
    """The routing of a layer without experts: one choice of none for each token."""
    ids_T1 = torch.full((len(x_TD), 1), NO_EXPERT, device=x_TD.device)
    return Routing(ids_T1, torch.zeros(ids_T1.shape, device=x_TD.device))


def choices_per_expert(expert_ids_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """[E] int64, how many choices name each expert; those of -1 count nowhere."""
    return _counts(expert_ids_TK.flatten() + 1, n_experts + 1)[1:]


def _counts(bins_N: torch.Tensor, n_bins: int) -> torch.Tensor:
    """How many items are in each bin; for `torch.bincount` the host would wait for a GPU."""
    return bins_N.new_zeros(n_bins).scatter_add(0, bins_N, torch.ones_like(bins_N))


def sequences(
    context: RouterContext, n_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each token [T] and the length of each sequence [B], both int64."""
    if context.sequence_T is None:
        sequence_T = torch.zeros(n_tokens, dtype=torch.long, device=device)
    else:
        sequence_T = context.sequence_T
    return sequence_T, _counts(sequence_T, context.n_sequences)


def places_in_segments(context: RouterContext, n_tokens: int, device: torch.device) -> torch.Tensor:
    """The place of each token in its segment [T], int64."""
    if context.place_T is not None:
        return context.place_T
    return places(sequences(context, n_tokens, device)[0])


def capacities(lengths_B: torch.Tensor, factor: float, top_k: int, n_experts: int) -> torch.Tensor:
    """Choices [B] that an expert takes of each sequence: ceil(factor * length * k / E)."""
    return (lengths_B.double() * (factor * top_k / n_experts)).ceil().long()


def keep_first_come(
    expert_ids_TK: torch.Tensor, capacity_B: torch.Tensor, sequence_T: torch.Tensor, n_experts: int
) -> torch.Tensor:
    """The ids, with -1 for every choice that came too late for its expert.

    Within a sequence all first choices come before all second ones, and earlier tokens before later
    ones, so the choices of a token never depend on later tokens as long as K = 1.
    """
    n_tokens, top_k = expert_ids_TK.shape
    by_rank_N = expert_ids_TK.t().flatten()
    sequence_N = sequence_T.repeat(top_k)
    line_N = (sequence_N * (n_experts + 1)) + by_rank_N + 1
    place_N = places(line_N)
    kept_N = by_rank_N.where(place_N < capacity_B[sequence_N], NO_EXPERT)
    return kept_N.view(top_k, n_tokens).t()


def within_capacity(routing: Routing, factor: float, context: RouterContext, n_experts: int) -> Routing:
    """`routing` without the choices that came too late for their expert, see `keep_first_come`.

    Args:
        factor: of the even share K * T / E of each sequence; 0 keeps all choices.
    """
    if factor == 0:
        return routing
    ids_TK = routing.expert_ids_TK
    sequence_T, lengths_B = sequences(context, len(ids_TK), ids_TK.device)
    capacity_B = capacities(lengths_B, factor, ids_TK.shape[1], n_experts)
    kept_TK = keep_first_come(ids_TK, capacity_B, sequence_T, n_experts)
    weights_TK = routing.weights_TK * (kept_TK != NO_EXPERT)
    return replace(routing, expert_ids_TK=kept_TK, weights_TK=weights_TK, wanted_TK=ids_TK)


def places(line_N: torch.Tensor) -> torch.Tensor:
    """How many earlier items stand in the same line as item n, [N] int64."""
    order_N = line_N.argsort(stable=True)
    sorted_N = line_N[order_N]
    position_N = torch.arange(len(line_N), device=line_N.device)
    starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    first_N = position_N.where(starts_N, 0).cummax(0).values if len(line_N) else position_N
    return torch.empty_like(line_N).index_copy_(0, order_N, position_N - first_N)
