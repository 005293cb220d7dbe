"""Losses on routing, as pure functions: what several policies share.

Shapes: T tokens, E experts.
"""

import torch

from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import choices_per_expert

TINY = 1e-10
"""Keeps quotients and logarithms finite, far below any share that matters."""


def token_mean(values_TX: torch.Tensor) -> torch.Tensor:
    """The mean over tokens, dimension 0; 0 for a rank without tokens."""
    return values_TX.sum(0) / max(values_TX.shape[0], 1)


def load_shares(routing: Routing, n_experts: int) -> torch.Tensor:
    """f [E]: the share of this rank's T * K choices that goes to each expert, before capacity."""
    wanted_TK = routing.expert_ids_TK if routing.wanted_TK is None else routing.wanted_TK
    return choices_per_expert(wanted_TK, n_experts).to(routing.weights_TK.dtype) / max(wanted_TK.numel(), 1)


def balance_loss(logits_TE: torch.Tensor, shares_E: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e, with P_e the mean softmax probability of expert e; 1 at balance.

    With `shares_E` averaged over ranks, the mean over ranks of this loss is the loss of the global
    batch, exactly, and so is its gradient (which passes through P alone).

    Paper: Fedus et al., "Switch Transformers", JMLR 2022, arXiv 2101.03961, eq. 4, for any k.
    """
    return shares_E.numel() * torch.dot(shares_E.to(logits_TE.dtype), token_mean(logits_TE.softmax(-1)))


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean_t logsumexp(g_t)^2, which keeps logits small.

    Paper: Zoph et al., "ST-MoE", 2022, arXiv 2202.08906, eq. 5.
    """
    return token_mean(logits_TE.logsumexp(-1).square())


def negative_entropy(logits_TE: torch.Tensor, context: RouterContext) -> torch.Tensor:
    """sum_e P_e ln P_e, with P_e the mean softmax probability over the tokens of all ranks.

    It is -ln E where P is uniform. The mean over ranks of its gradients is the gradient of the global
    batch's, exactly.

    Paper: Csordas et al., "Approximating Two-Layer Feedforward Networks for Efficient Transformers",
    EMNLP Findings 2023, arXiv 2310.10837, eq. 20.
    """
    mean_E = context.over_ranks(token_mean(logits_TE.softmax(-1)))
    return (mean_E * mean_E.clamp_min(TINY).log()).sum()


def squared_variation(values_E: torch.Tensor) -> torch.Tensor:
    """Variance over squared mean, 0 where all values are equal.

    Paper: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017, arXiv 1701.06538, eq. 7.
    """
    return values_E.var(correction=0) / values_E.mean().square().clamp_min(TINY)
