"""One decoder layer: attention, then a mixture of experts or a dense feed-forward network.

Shapes: B batch, S segment, M memory, C = M + S, D model width.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.config.schema import ModelConfig
from megamoe.models.attention import AttentionInputs, RelativeAttention
from megamoe.models.feed_forward import FeedForward
from megamoe.moe.layer import MoELayer
from megamoe.moe.routing import RouterContext, Routing


class Block(nn.Module):
    """Two sublayers f, each y = LayerNorm(x + Dropout(f(x))), or x + Dropout(f(LayerNorm(x))) if pre-norm.

    Args:
        model: sizes, dropout and the place of the norm.
        moe: the mixture layer; None for a dense feed-forward network.

    Attributes:
        checkpoint_activations: recompute attention and the dense network in the backward pass instead
            of keeping their activations. The mixture layer has its own switch.
    """

    def __init__(self, model: ModelConfig, moe: MoELayer | None) -> None:
        super().__init__()
        self.pre_norm = model.pre_norm
        self.checkpoint_activations = False
        self.attention = RelativeAttention(
            model.d_model, model.n_heads, model.d_head, model.attention_dropout
        )
        self.attention_norm = nn.LayerNorm(model.d_model)
        self.moe = moe
        self.feed_forward = FeedForward(model.d_model, model.d_inner, model.dropout) if moe is None else None
        self.feed_forward_norm = nn.LayerNorm(model.d_model)
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self,
        x_BSD: torch.Tensor,
        memory_BMD: torch.Tensor,
        inputs: AttentionInputs,
        context: RouterContext,
        real_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """Apply the layer.

        Args:
            x_BSD: output of the layer below.
            memory_BMD: the layer's inputs in earlier segments.
            inputs: what the attention of all layers shares.
            context: what the router may look at; of the real tokens alone.
            real_N: places in B * S of the tokens that are no padding, which alone go to experts; None: all.

        Returns:
            [B, S, D], and the mixture layer's decision if the layer has one.
        """
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        if recompute:
            x_BSD = checkpoint(self._attend, x_BSD, memory_BMD, inputs, use_reentrant=False)
        else:
            x_BSD = self._attend(x_BSD, memory_BMD, inputs)
        if self.moe is not None:
            y_BSD, routing = self._mix(self._before(self.feed_forward_norm, x_BSD), context, real_N)
            return self._after(self.feed_forward_norm, x_BSD, y_BSD), routing
        if recompute:
            return checkpoint(self._feed_forward, x_BSD, use_reentrant=False), None
        return self._feed_forward(x_BSD), None

    def _attend(self, x_BSD: torch.Tensor, memory_BMD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        context_BCD = self._before(self.attention_norm, torch.cat([memory_BMD, x_BSD], dim=1))
        return self._after(self.attention_norm, x_BSD, self.attention(context_BCD, inputs))

    def _mix(
        self, x_BSD: torch.Tensor, context: RouterContext, real_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routing]:
        assert self.moe is not None
        if real_N is None:
            return self.moe(x_BSD, context)
        y_ND, routing = self.moe(x_BSD.flatten(0, 1)[real_N], context)
        y_TD = y_ND.new_zeros(x_BSD.shape[0] * x_BSD.shape[1], y_ND.shape[-1])
        return y_TD.index_copy(0, real_N, y_ND).view(x_BSD.shape), routing

    def _feed_forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        assert self.feed_forward is not None
        y_BSD = self.feed_forward(self._before(self.feed_forward_norm, x_BSD))
        return self._after(self.feed_forward_norm, x_BSD, y_BSD)

    def _before(self, norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, norm: nn.LayerNorm, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(y)
        return x if self.pre_norm else norm(x)
