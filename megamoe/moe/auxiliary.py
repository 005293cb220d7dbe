"""What is added to the language-model loss for the mixture layers."""

from collections.abc import Callable, Sequence

import torch

from megamoe.config.schema import MoEConfig
from megamoe.errors import ConfigError
from megamoe.moe.losses import balance_loss, load_shares, z_loss
from megamoe.moe.routers import resolve_options, router_class
from megamoe.moe.routing import Routing


def balance_weight(moe: MoEConfig) -> float:
    """The weight of the balance loss: `moe.balance_loss`, or what its policy was published with."""
    return router_class(moe.router.name).balance_loss if moe.balance_loss == "auto" else moe.balance_loss


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
    if weight := balance_weight(moe):
        shares_LE = mean_over_ranks(
            torch.stack([load_shares(routing, moe.n_experts) for routing in routings])
        )
        logits = _logits(routings, "balance_loss", moe)
        losses["balance"] = weight, list(map(balance_loss, logits, shares_LE))
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
