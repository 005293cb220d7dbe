"""The mixture layer: route, exchange, compute, combine."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.config.schema import MoEConfig
from megamoe.moe.exchange import Exchange, LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.routers import build_router
from megamoe.moe.routing import RouterContext, Routing


class MoELayer(nn.Module):
    """y_t = sum_j w_tj Expert_{e_tj}(x_t), with (e, w) from the router. No norm, residual or dropout on y.

    Args:
        d_model: model width D.
        moe: sizes and routing policy.
        layer: 0-based index in the model; with `seed` it decides the initial values.
        seed: the run's seed.
        dropout: dropout on the experts' hidden units.
        init_std: standard deviation of initial weights.
        local_experts: global ids of the experts held here; all by default.
        exchange: how rows reach the experts; within this process by default.

    Attributes:
        checkpoint_activations: recompute exchange and experts in the backward pass instead of keeping
            their activations. Routing is kept, so a recomputed step cannot route differently.
    """

    def __init__(
        self,
        d_model: int,
        moe: MoEConfig,
        *,
        layer: int,
        seed: int,
        dropout: float,
        init_std: float,
        local_experts: range | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.n_experts = moe.n_experts
        self.checkpoint_activations = False
        self.exchange = exchange if exchange is not None else LocalExchange()
        self.router = build_router(moe.router, d_model, moe.n_experts, layer, seed, init_std)
        self.experts = Experts(
            moe.n_experts, d_model, moe.d_expert, dropout=dropout, init_std=init_std, seed=seed, layer=layer,
            local=local_experts if local_experts is not None else range(moe.n_experts),
        )  # fmt: skip

    def forward(self, x_BSD: torch.Tensor, context: RouterContext) -> tuple[torch.Tensor, Routing]:
        """Send every token through its experts.

        Returns:
            [B, S, D] in the type of the experts, and the decision behind it.
        """
        x_TD = x_BSD.flatten(0, -2)
        with torch.autocast(x_TD.device.type, enabled=False):
            routing = self.router(x_TD, context)
        choice = (x_TD, routing.expert_ids_TK, routing.weights_TK, context.token_keys_T)
        if self.checkpoint_activations and torch.is_grad_enabled():
            y_TD = checkpoint(self._apply_experts, *choice, use_reentrant=False, preserve_rng_state=False)
        else:
            y_TD = self._apply_experts(*choice)
        return y_TD.view_as(x_BSD), routing

    def _apply_experts(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        token_keys_T: torch.Tensor | None,
    ) -> torch.Tensor:
        dispatched = self.exchange.dispatch(x_TD, expert_ids_TK, self.n_experts)
        keys_N = None
        if self.experts.dropout.active:
            assert token_keys_T is not None, "dropout in training: give RouterContext.token_keys_T"
            keys_N = self.exchange.send_along(token_keys_T, dispatched)
        rows_ND = self.experts(dispatched.rows_ND, dispatched.counts, keys_N)
        return self.exchange.combine(rows_ND, weights_TK, dispatched)
