"""Several forward passes of different routing over the same segment, as one batch: see `Router.routes`.

Shapes: R routes, B sequences, S positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megamoe.moe.randomness import at_site
from megamoe.moe.routing import Routing


def repeat_rows(x: torch.Tensor, n_routes: int) -> torch.Tensor:
    """[B, ...] as [R * B, ...]: all sequences of the first route, then those of the next."""
    return x.repeat(n_routes, *[1] * (x.dim() - 1))


def repeat_keys(keys_BS: torch.Tensor, n_routes: int) -> torch.Tensor:
    """Keys of the tokens of all routes, so that each draws its own dropout and noise; the first as alone."""
    return torch.cat([keys_BS, *(at_site(keys_BS, f"route {route}") for route in range(1, n_routes))])


def consistency(logits_NSV: torch.Tensor, n_routes: int) -> torch.Tensor:
    """Mean over tokens of (KL(p || q) + KL(q || p)) / 2 between the predictions of two routes.

    Paper: Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts", ICLR 2022,
    arXiv 2110.04260, eq. 6.
    """
    assert n_routes == 2, "routes are compared in pairs"
    log_p_BSV, log_q_BSV = logits_NSV.log_softmax(-1).chunk(2)
    return ((log_p_BSV.exp() - log_q_BSV.exp()) * (log_p_BSV - log_q_BSV)).sum(-1).mean() / 2


def with_loss(routings: Sequence[Routing], name: str, value: torch.Tensor) -> tuple[Routing, ...]:
    """The routings with a loss of the whole model, filed under the uppermost mixture layer."""
    *below, top = routings
    return (*below, replace(top, losses={**top.losses, name: value}))
