"""Transformer-XL with mixture-of-experts layers: a language model with memory of earlier segments.

Shapes: B batch, S segment, M memory, D model width, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.models.adaptive_softmax import AdaptiveSoftmax
from megamoe.models.attention import (
    AttentionInputs,
    AttentionSpan,
    encode_distances,
    hide_keys,
    hide_padding,
)
from megamoe.models.block import Block
from megamoe.models.embeddings import AdaptiveEmbedding
from megamoe.models.initialization import initialize
from megamoe.moe.layer import MoELayer
from megamoe.moe.routing import RouterContext, Routing, on_one_rank


class ModelOutput(NamedTuple):
    """What one segment gives. A tuple, because DeepSpeed's hooks look for tensors in tuples.

    Attributes:
        loss_BS: nats per token at its position, fp32; None without targets.
        logits_BSV: fp32 logits (log probabilities with an adaptive softmax); None unless asked for.
        hidden_BSD: what the output layer reads.
        memory: for the next segment, L inputs of layers [B, M, D], without gradient.
        routings: one per mixture layer, from below.
    """

    loss_BS: torch.Tensor | None
    logits_BSV: torch.Tensor | None
    hidden_BSD: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    routings: tuple[Routing, ...]


class Hidden(NamedTuple):
    """What `Backbone.read` gives: see `ModelOutput`, which has the same fields."""

    hidden_BSD: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    routings: tuple[Routing, ...]


class Backbone(nn.Module):
    """Everything below the output layer, which a subclass adds before it calls `initialize`.

    Args:
        model: the backbone; its `vocab_size` must be set.
        moe: the mixture layers.
        seed: the run's seed.
        build_moe_layer: called as `MoELayer` is; parallel runs give their own.
        mean_over_ranks: see `RouterContext`.

    Raises:
        ConfigError: the vocabulary is unknown or a setting does not fit the others.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        *,
        seed: int,
        build_moe_layer: Callable[..., MoELayer] = MoELayer,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = on_one_rank,
    ) -> None:
        super().__init__()
        self.model_config = model
        self.moe_config = moe
        self.seed = seed
        self.span = AttentionSpan(model.memory_len, model.same_length, model.clamp_len)
        self.mean_over_ranks = mean_over_ranks
        mixtures = {
            i: build_moe_layer(
                model.d_model, moe, layer=i, seed=seed, dropout=model.dropout, init_std=model.init_std
            )
            for i in moe.layer_indices(model.n_layers)
        }
        self.attention_bias_u = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.attention_bias_v = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.embedding = AdaptiveEmbedding(model)
        self.layers = nn.ModuleList(Block(model, mixtures.get(i)) for i in range(model.n_layers))
        self.dropout = nn.Dropout(model.dropout)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The mixture layers, from below."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them. Routing is kept."""
        for module in self.modules():
            if isinstance(module, Block | MoELayer):
                module.checkpoint_activations = enabled

    def read(
        self,
        input_ids_BS: torch.Tensor,
        memory: tuple[torch.Tensor, ...] | None,
        *,
        top_k: int | None,
        step: int,
        span: AttentionSpan | None,
        padding_BC: torch.Tensor | None = None,
    ) -> Hidden:
        """Read one segment; see `TransformerXL.forward`.

        Args:
            padding_BC: True where a position of memory or segment is padding: it sees nothing, nothing
                sees it, and it goes to no expert. None where there is none.
        """
        span = span or self.span
        x_BSD = self.dropout(self.embedding(input_ids_BS))
        memory = memory or (x_BSD[:, :0].detach(),) * len(self.layers)
        inputs = self._attention_inputs(x_BSD, memory[0], span, padding_BC)
        token_ids_T, real_N = input_ids_BS.flatten(), None
        if padding_BC is not None:
            real_N = (~padding_BC[:, -input_ids_BS.shape[1] :]).flatten().nonzero().flatten()
            token_ids_T = token_ids_T[real_N]
        context = RouterContext(
            step=step,
            seed=self.seed,
            top_k=self.moe_config.top_k if top_k is None else top_k,
            token_ids_T=token_ids_T,
            mean_over_ranks=self.mean_over_ranks,
        )
        new_memory, routings = [], []
        for layer, memory_BMD in zip(self.layers, memory, strict=True):
            new_memory.append(_extend(memory_BMD, x_BSD, span.memory_len))
            x_BSD, routing = layer(x_BSD, memory_BMD, inputs, context, real_N)
            if routing is not None:
                routings.append(routing)
                context = replace(context, previous=routing)
        return Hidden(self.dropout(x_BSD), tuple(new_memory), tuple(routings))

    def _attention_inputs(
        self,
        x_BSD: torch.Tensor,
        memory_BMD: torch.Tensor,
        span: AttentionSpan,
        padding_BC: torch.Tensor | None,
    ) -> AttentionInputs:
        segment_len = x_BSD.shape[1]
        context_len = memory_BMD.shape[1] + segment_len
        distances_PD = encode_distances(context_len, x_BSD.shape[2], span.clamp_len, like=x_BSD)
        hidden_SC = hide_keys(segment_len, context_len, span, x_BSD.device)
        if padding_BC is not None:
            hidden_SC = hide_padding(hidden_SC, padding_BC)
        return AttentionInputs(
            self.dropout(distances_PD), hidden_SC, self.attention_bias_u, self.attention_bias_v
        )


class TransformerXL(Backbone):
    """Dai et al., Transformer-XL, ACL 2019, with experts in the layers that `moe.layers` names.

    The initial values depend on `seed` and the names of the parameters alone. Arguments and errors are
    those of `Backbone`.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, *, seed: int, **settings: Any) -> None:
        super().__init__(model, moe, seed=seed, **settings)
        self.output = AdaptiveSoftmax(model)
        initialize(self, model, seed)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        memory: tuple[torch.Tensor, ...] | None = None,
        *,
        top_k: int | None = None,
        step: int = 0,
        span: AttentionSpan | None = None,
        return_logits: bool = False,
    ) -> ModelOutput:
        """Read one segment.

        Args:
            input_ids_BS: tokens, int64.
            targets_BS: the tokens that follow them; None computes no loss.
            memory: what the segment before returned; None starts without.
            top_k: experts per token; None means `moe.top_k`.
            step: optimizer steps done, for policies that change with it.
            span: how far back attention reaches; None means as in training.
            return_logits: also score the whole vocabulary.
        """
        hidden_BSD, memory, routings = self.read(input_ids_BS, memory, top_k=top_k, step=step, span=span)
        loss_BS, logits_BSV = self.output(
            hidden_BSD,
            targets_BS,
            list(self.embedding.weights),
            list(self.embedding.projections),
            return_logits=return_logits,
        )
        return ModelOutput(loss_BS, logits_BSV, hidden_BSD, memory, routings)


def _extend(memory_BMD: torch.Tensor, x_BSD: torch.Tensor, memory_len: int) -> torch.Tensor:
    """The last `memory_len` positions of memory and segment, a detached copy."""
    n_new = min(x_BSD.shape[1], memory_len)
    n_old = min(memory_BMD.shape[1], memory_len - n_new)
    old, new = memory_BMD[:, memory_BMD.shape[1] - n_old :], x_BSD[:, x_BSD.shape[1] - n_new :]
    return torch.cat([old, new], dim=1).detach()
