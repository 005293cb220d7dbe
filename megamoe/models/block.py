"""One decoder layer: attention, then a mixture of experts or a dense feed-forward network.

Shapes: B batch, S segment, M memory, C = M + S, D model width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.config.schema import ModelConfig
from megamoe.models.attention import AttentionInputs, RelativeAttention
from megamoe.models.feed_forward import FeedForward
from megamoe.moe.dropout import Dropout
from megamoe.moe.layer import MoELayer
from megamoe.moe.rooms import room
from megamoe.moe.routing import RouterContext, Routing


class Block(nn.Module):
    """Two sublayers f, each y = LayerNorm(x + Dropout(f(x))), or x + Dropout(f(LayerNorm(x))) if pre-norm.

    The model calls them one by one: the number of experts matters to the second alone.

    Args:
        model: sizes, dropout and the place of the norm.
        layer: 0-based index in the model, by which dropout is drawn.
        moe: the mixture layer; None for a dense feed-forward network.

    Attributes:
        checkpoint_activations: recompute attention and the dense network in the backward pass instead
            of keeping their activations. The mixture layer has its own switch.
    """

    def __init__(self, model: ModelConfig, layer: int, moe: MoELayer | None) -> None:
        super().__init__()

        def dropout(p: float, place: str) -> Dropout:
            return Dropout(p, f"layers.{layer}.{place}")

        self.pre_norm = model.pre_norm
        self.checkpoint_activations = False
        self.attention = RelativeAttention(
            model.d_model,
            model.n_heads,
            model.d_head,
            dropout(model.attention_dropout, "attention.probabilities"),
        )
        self.attention_dropout = dropout(model.dropout, "attention")
        self.attention_norm = nn.LayerNorm(model.d_model)
        self.moe = moe
        self.feed_forward = None
        if moe is None:
            drop_hidden = dropout(model.dropout, "feed_forward.hidden")
            self.feed_forward = FeedForward(model.d_model, model.d_inner, drop_hidden)
        self.feed_forward_dropout = dropout(model.dropout, "feed_forward")
        self.feed_forward_norm = nn.LayerNorm(model.d_model)

    def attend(self, x_BSD: torch.Tensor, memory_BMD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """Apply the first sublayer.

        Args:
            x_BSD: output of the layer below.
            memory_BMD: the layer's inputs in earlier segments.
            inputs: what the attention of all layers shares.

        Returns:
            [B, S, D].
        """
        return self._recomputed(self._attend, x_BSD, memory_BMD, inputs)

    def apply_feed_forward(
        self,
        x_BSD: torch.Tensor,
        keys_BS: torch.Tensor | None,
        context: RouterContext,
        real_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """Apply the second sublayer.

        Args:
            x_BSD: what `attend` returns.
            keys_BS: keys of the tokens, for dropout; None in evaluation.
            context: what the router may look at; of the real tokens alone.
            real_N: places in B * S of the tokens that are no padding, which alone go to experts; None: all.

        Returns:
            [B, S, D], and the mixture layer's decision if the layer has one.
        """
        if self.moe is None:
            return self._recomputed(self._feed_forward, x_BSD, keys_BS), None
        y_BSD, routing = self._mix(self._before(self.feed_forward_norm, x_BSD), context, real_N)
        y_BSD = self.feed_forward_dropout(y_BSD, keys_BS)
        return self._after(self.feed_forward_norm, x_BSD, y_BSD), routing

    def project(self, memory_BMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [A, B, M, W] of the layer's inputs in earlier segments."""
        context_BMD = self._before(self.attention_norm, memory_BMD)
        _, keys_ABMW, values_ABMW = self.attention.qkv(context_BMD, segment_len=1)
        return keys_ABMW, values_ABMW

    def _attend(self, x_BSD: torch.Tensor, memory_BMD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        context_BCD = self._before(self.attention_norm, torch.cat([memory_BMD, x_BSD], dim=1))
        with room("attention"):
            y_BSD = self.attention(context_BCD, inputs)
        y_BSD = self.attention_dropout(y_BSD, inputs.keys_BS)
        return self._after(self.attention_norm, x_BSD, y_BSD)

    def _mix(
        self, x_BSD: torch.Tensor, context: RouterContext, real_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routing]:
        assert self.moe is not None
        if real_N is None:
            return self.moe(x_BSD, context)
        y_ND, routing = self.moe(x_BSD.flatten(0, 1)[real_N], context)
        y_TD = y_ND.new_zeros(x_BSD.shape[0] * x_BSD.shape[1], y_ND.shape[-1])
        return y_TD.index_copy(0, real_N, y_ND).view(x_BSD.shape), routing

    def _feed_forward(self, x_BSD: torch.Tensor, keys_BS: torch.Tensor | None) -> torch.Tensor:
        assert self.feed_forward is not None
        y_BSD = self._before(self.feed_forward_norm, x_BSD)
        with room("feed_forward"):
            y_BSD = self.feed_forward(y_BSD, keys_BS)
        return self._after(self.feed_forward_norm, x_BSD, self.feed_forward_dropout(y_BSD, keys_BS))

    def _before(self, norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, norm: nn.LayerNorm, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if self.pre_norm else norm(x + y)

    def _recomputed(self, function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Dropout needs no random state to be the same again.
            kept: Any = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
            return kept
        return function(*inputs)
