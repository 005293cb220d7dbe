"""The mixture layer: route, exchange, compute, combine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.config.schema import MoEConfig
from megamoe.moe.compressed import CompressedExperts
from megamoe.moe.exchange import Arrived, Exchange, LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.rooms import room
from megamoe.moe.routers import build_router
from megamoe.moe.routing import LayerSpec, Router, RouterContext, Routing


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
        below: router of the mixture layer below.
        sizes: further fields of `LayerSpec`.

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
        below: Router | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.n_experts = moe.n_experts
        self.checkpoint_activations = False
        self.exchange = exchange if exchange is not None else LocalExchange()
        spec = LayerSpec(
            d_model=d_model, n_experts=moe.n_experts, d_expert=moe.d_expert, layer=layer, seed=seed,
            init_std=init_std, dropout=dropout, below=below, **sizes,
        )  # fmt: skip
        self.router = build_router(moe.router, spec)
        self.experts: Experts | CompressedExperts | None = None
        if not self.router.owns_feed_forward:
            self.experts = Experts(
                moe.n_experts, d_model, moe.d_expert, dropout=dropout, init_std=init_std, seed=seed,
                layer=layer, init_stds=self.router.initial_stds(),
                local=local_experts if local_experts is not None else range(moe.n_experts),
            )  # fmt: skip

    def forward(self, x_BSD: torch.Tensor, context: RouterContext) -> tuple[torch.Tensor, Routing]:
        """Send every token through its experts.

        Returns:
            [B, S, D] in the type of the experts, and the decision behind it.
        """
        x_TD = x_BSD.flatten(0, -2)
        with room("feed_forward" if self.experts is None else "routing"):
            y_TD, routing = self.router.mix(x_TD, context, _LayerMixture(self, context.token_keys_T))
        return y_TD.view_as(x_BSD), routing


class _LayerMixture:
    """The experts of `layer` for one forward pass: what a policy sees as `routing.Mixture`."""

    def __init__(self, layer: MoELayer, token_keys_T: torch.Tensor | None) -> None:
        self.layer, self.exchange, self.token_keys_T = layer, layer.exchange, token_keys_T

    @property
    def experts(self) -> Experts | CompressedExperts:
        """Those of the layer; a policy that owns its feed-forward network has none to ask."""
        assert self.layer.experts is not None
        return self.layer.experts

    def combine(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Each token's weighted outputs, summed."""
        return self._recomputed(self._combine, x_TD, expert_ids_TK, weights_TK)

    def outputs(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """Each choice's output."""
        return self._recomputed(self._outputs, x_TD, expert_ids_TK)

    def responses(self, x_TD: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What every expert says of every token."""
        with room("exchange"):
            x_ND, counts = self.exchange.to_all(x_TD)
        with room("experts"):
            scores_NE = self.experts.responses(x_ND, response)
        with room("exchange"):
            return self.exchange.from_all(scores_NE, counts, len(x_TD))

    def _recomputed(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        if self.layer.checkpoint_activations and torch.is_grad_enabled():
            kept: Any = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
            return kept
        return function(*inputs)

    def _combine(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        arrived = self._dispatch(x_TD, expert_ids_TK, weights_TK)
        with room("experts"):
            y_ND = self.experts(arrived)
        with room("exchange"):
            return self.exchange.bring_home(y_ND, arrived)

    def _outputs(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        arrived = self._dispatch(x_TD, expert_ids_TK, None)
        with room("experts"):
            rows_PD = self.experts.outputs(arrived)
        with room("exchange"):
            return self.exchange.bring_choices_home(rows_PD, arrived)

    def _dispatch(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor | None
    ) -> Arrived:
        keys_T = self.token_keys_T if self.experts.dropout.active else None
        with room("exchange"):
            return self.exchange.dispatch(x_TD, expert_ids_TK, weights_TK, self.layer.n_experts, keys_T)
