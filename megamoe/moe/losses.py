"""Auxiliary losses of the mixture layers, as pure functions of what the routers decided."""

from collections.abc import Callable, Sequence

import torch

from megamoe.config.schema import MoEConfig
from megamoe.errors import ConfigError
from megamoe.moe.routers import resolve_options
from megamoe.moe.routing import Routing, choices_per_expert


def load_shares(routing: Routing, n_experts: int) -> torch.Tensor:
    """f [E] fp32: the share of this rank's T * K choices that goes to each expert."""
    return choices_per_expert(routing.expert_ids_TK, n_experts).float() / routing.expert_ids_TK.numel()


def balance_loss(logits_TE: torch.Tensor, shares_E: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, with P_e the mean softmax probability of expert e; 1 at balance.

    With `shares_E` averaged over ranks, the mean over ranks of this loss is the loss of the global
    batch, exactly, and so is its gradient (which passes through P alone).

    Paper: Fedus et al., "Switch Transformers", JMLR 2022, arXiv 2101.03961, eq. 4, for any k.
    """
    return shares_E.numel() * torch.dot(shares_E, logits_TE.softmax(-1).mean(0))


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean_t logsumexp(g_t)^2, which keeps logits small.

    Paper: Zoph et al., "ST-MoE", 2022, arXiv 2202.08906, eq. 5.
    """
    return logits_TE.logsumexp(-1).square().mean()


def auxiliary_loss(
    routings: Sequence[Routing],
    moe: MoEConfig,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is added to the language-model loss, for all mixture layers of one forward pass.

    Each loss is averaged over the mixture layers, so its weight means the same at every depth. Losses
    of weight 0 are not computed.

    Args:
        routings: one for each mixture layer.
        moe: `balance_loss` and `z_loss` weigh those two, the policy's option ``x_loss`` its loss ``x``.
        mean_over_ranks: averages a tensor over all data-parallel ranks, without gradient. Called once
            when the balance loss is on, else not at all.

    Returns:
        The weighted sum, and each loss by name before weighting.

    Raises:
        ConfigError: a loss on logits is asked of a policy that has none.
    """
    raw: dict[str, torch.Tensor] = {}
    total = torch.zeros(())
    for name, (weight, per_layer) in _in_force(routings, moe, mean_over_ranks).items():
        raw[name] = torch.stack(per_layer).mean()
        total = total + weight * raw[name]
    return total, raw


def _in_force(
    routings: Sequence[Routing],
    moe: MoEConfig,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, tuple[float, list[torch.Tensor]]]:
    """Weight and values by layer of each loss with a weight."""
    if not routings:
        return {}
    losses: dict[str, tuple[float, list[torch.Tensor]]] = {}
    if moe.balance_loss:
        shares_LE = mean_over_ranks(
            torch.stack([load_shares(routing, moe.n_experts) for routing in routings])
        )
        logits = _logits(routings, "balance_loss", moe)
        losses["balance"] = moe.balance_loss, list(map(balance_loss, logits, shares_LE))
    if moe.z_loss:
        losses["z"] = moe.z_loss, list(map(z_loss, _logits(routings, "z_loss", moe)))
    names = {name for routing in routings for name in routing.losses}
    options = resolve_options(moe.router) if names else None
    for name in sorted(names):
        if weight := getattr(options, f"{name}_loss"):
            losses[name] = weight, [routing.losses[name] for routing in routings if name in routing.losses]
    return losses


def _logits(routings: Sequence[Routing], field: str, moe: MoEConfig) -> list[torch.Tensor]:
    logits = [routing.logits_TE for routing in routings if routing.logits_TE is not None]
    if len(logits) < len(routings):
        raise ConfigError(
            f"moe.{field} = {getattr(moe, field)}: set it to 0, policy {moe.router.name!r} has no logits"
        )
    return logits
