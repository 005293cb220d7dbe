"""Transformer-XL with mixture-of-experts layers: a language model with memory of earlier segments.

Shapes: B batch, S segment, M memory, D model width, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from megamoe.models.routes import consistency, repeat_keys, repeat_rows, with_loss
from megamoe.moe.dropout import Dropout
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import position_keys, token_keys
from megamoe.moe.ranks import ONE_RANK, Ranks
from megamoe.moe.rooms import room
from megamoe.moe.routers import resolve_options, router_class
from megamoe.moe.routing import Router, RouterContext, Routing


@dataclass(frozen=True)
class Trunk:
    """What reading a segment comes to before the number of experts matters.

    Attributes:
        x_BSD: after the attention of the first mixture layer; the embedding if there are no such layers.
        memory: for the next segment, inputs of the layers whose attention is done [B, M, D].
        inputs: what the attention of all layers shares.
    """

    x_BSD: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    inputs: AttentionInputs


class ModelOutput(NamedTuple):
    """What one segment gives. A tuple, because DeepSpeed's hooks look for tensors in tuples.

    Attributes:
        loss_BS: nats per token at its position, fp32; None without targets.
        logits_BSV: fp32 logits (log probabilities with an adaptive softmax); None unless asked for.
        hidden_BSD: what the output layer reads.
        memory: for the next segment, L inputs of layers [B, M, D], without gradient.
        routings: one per mixture layer, from below.
        trunk: what reading the same segment with another k can start from, in evaluation without gradient;
            None elsewhere.
    """

    loss_BS: torch.Tensor | None
    logits_BSV: torch.Tensor | None
    hidden_BSD: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    routings: tuple[Routing, ...]
    trunk: Trunk | None = None


class Hidden(NamedTuple):
    """What `Backbone.read` gives: see `ModelOutput`, which has the same fields."""

    hidden_BSD: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    routings: tuple[Routing, ...]
    trunk: Trunk | None


class Backbone(nn.Module):
    """Everything below the output layer, which a subclass adds before it calls `initialize`.

    Args:
        model: the backbone; its `vocab_size` must be set.
        moe: the mixture layers.
        seed: the run's seed.
        build_moe_layer: called as `MoELayer` is; parallel runs give their own.
        ranks: see `RouterContext`.

    Attributes:
        shares_trunk: whether evaluation returns a `Trunk`. If not, all forward passes call the same modules.

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
        ranks: Ranks = ONE_RANK,
    ) -> None:
        super().__init__()
        self.model_config = model
        self.moe_config = moe
        self.seed = seed
        self.span = AttentionSpan(model.memory_len, model.same_length, model.clamp_len)
        self.ranks = ranks
        self.shares_trunk = True
        mixtures: dict[int, MoELayer] = {}
        below: Router | None = None
        for i in moe.layer_indices(model.n_layers):
            mixtures[i] = build_moe_layer(
                model.d_model, moe, layer=i, seed=seed, dropout=model.dropout, init_std=model.init_std,
                below=below, n_layers=model.n_layers, vocab_size=model.vocab_size,
            )  # fmt: skip
            below = mixtures[i].router
        self.attention_bias_u = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.attention_bias_v = nn.Parameter(torch.empty(model.n_heads, model.d_head))
        self.embedding = AdaptiveEmbedding(model)
        self.layers = nn.ModuleList(Block(model, i, mixtures.get(i)) for i in range(model.n_layers))
        self.embedding_dropout = Dropout(model.dropout, "embedding")
        self.position_dropout = Dropout(model.dropout, "positions")
        self.output_dropout = Dropout(model.dropout, "output")

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
        keys_BS: torch.Tensor | None,
        padding_BC: torch.Tensor | None = None,
        domains_B2: torch.Tensor | None = None,
        n_routes: int = 1,
        trunk: Trunk | None = None,
    ) -> Hidden:
        """Read one segment; see `TransformerXL.forward`.

        Args:
            keys_BS: from `token_keys`.
            padding_BC: True where a position of memory or segment is padding: it sees nothing, nothing
                sees it, and it goes to no expert. None where there is none.
            domains_B2, trunk: see `TransformerXL.forward`.
            n_routes: so many equal parts of the rows are the same text, to be routed differently.
        """
        shares_trunk = self.shares_trunk and not (self.training or torch.is_grad_enabled())
        assert trunk is None or shares_trunk, "a trunk is for evaluation without gradient"
        span = span or self.span
        if trunk is None:
            trunk = self._embed(input_ids_BS, memory, span, step, keys_BS, padding_BC)
        x_BSD = trunk.x_BSD
        memory = memory or (x_BSD[:, :0].detach(),) * len(self.layers)
        context, real_N = self._router_context(
            input_ids_BS, top_k, step, keys_BS, padding_BC, domains_B2, n_routes
        )
        new_memory = list(trunk.memory)
        routings: list[Routing] = []
        # The experts of a trunk's last layer are yet to come.
        for i in range(max(0, len(new_memory) - 1), len(self.layers)):
            layer: Any = self.layers[i]
            if i == len(new_memory):
                new_memory.append(_extend(memory[i], x_BSD, span.memory_len))
                x_BSD = layer.attend(x_BSD, memory[i], trunk.inputs)
            if layer.moe is not None and not routings:
                trunk = Trunk(x_BSD, tuple(new_memory), trunk.inputs)
            x_BSD, routing = layer.apply_feed_forward(x_BSD, keys_BS, context, real_N)
            if routing is not None:
                routings.append(routing)
                context = replace(context, previous=routing)
        hidden_BSD = self.output_dropout(x_BSD, keys_BS)
        return Hidden(hidden_BSD, tuple(new_memory), tuple(routings), trunk if shares_trunk else None)

    def token_keys(self, input_ids_BS: torch.Tensor, step: int, rows: range | None) -> torch.Tensor | None:
        """Keys [B, S] by which the tokens draw dropout; None in evaluation. See `TransformerXL.forward`."""
        if not self.training:
            return None
        batch_size, segment_len = input_ids_BS.shape
        rows = range(batch_size) if rows is None else rows
        assert len(rows) == batch_size, f"{rows} for a batch of {batch_size}"
        return token_keys(self.seed, step, rows, segment_len, input_ids_BS.device)

    def _router_context(
        self,
        input_ids_BS: torch.Tensor,
        top_k: int | None,
        step: int,
        keys_BS: torch.Tensor | None,
        padding_BC: torch.Tensor | None,
        domains_B2: torch.Tensor | None,
        n_routes: int,
    ) -> tuple[RouterContext, torch.Tensor | None]:
        """What routers may look at, and the places of the tokens that are no padding; None: all."""
        token_ids_T, real_N = input_ids_BS.flatten(), None
        sequences_B = torch.arange(len(input_ids_BS), device=input_ids_BS.device)
        sequence_T = sequences_B.repeat_interleave(input_ids_BS.shape[1])
        token_keys_T = None if keys_BS is None else keys_BS.flatten()
        if padding_BC is not None:
            real_N = (~padding_BC[:, -input_ids_BS.shape[1] :]).flatten().nonzero().flatten()
            token_ids_T, sequence_T = token_ids_T[real_N], sequence_T[real_N]
            token_keys_T = None if token_keys_T is None else token_keys_T[real_N]
        context = RouterContext(
            step=step,
            seed=self.seed,
            top_k=self.moe_config.top_k if top_k is None else top_k,
            token_ids_T=token_ids_T,
            token_keys_T=token_keys_T,
            sequence_T=sequence_T,
            n_sequences=len(input_ids_BS),
            domain_T2=None if domains_B2 is None else domains_B2[sequence_T],
            route_T=sequence_T // (len(input_ids_BS) // n_routes) if n_routes > 1 else None,
            ranks=self.ranks,
        )
        return context, real_N

    def _embed(
        self,
        input_ids_BS: torch.Tensor,
        memory: tuple[torch.Tensor, ...] | None,
        span: AttentionSpan,
        step: int,
        keys_BS: torch.Tensor | None,
        padding_BC: torch.Tensor | None,
    ) -> Trunk:
        """A trunk of no layers: embeddings, and what attention needs."""
        x_BSD = self.embedding_dropout(self.embedding(input_ids_BS), keys_BS)
        segment_len = x_BSD.shape[1]
        context_len = segment_len + (memory[0].shape[1] if memory else 0)
        distances_PD = encode_distances(context_len, x_BSD.shape[2], span.clamp_len, like=x_BSD)
        hidden_SC = hide_keys(segment_len, context_len, span, x_BSD.device)
        if padding_BC is not None:
            hidden_SC = hide_padding(hidden_SC, padding_BC)
        if self.position_dropout.active:
            distances_P = torch.arange(context_len, -1, -1, device=x_BSD.device)
            distances_PD = self.position_dropout(distances_PD, position_keys(self.seed, step, distances_P))
        inputs = AttentionInputs(
            distances_PD, hidden_SC, self.attention_bias_u, self.attention_bias_v, keys_BS,
            hides_later_only=padding_BC is None and not span.same_length,
        )  # fmt: skip
        return Trunk(x_BSD, (), inputs)


class TransformerXL(Backbone):
    """Dai et al., Transformer-XL, ACL 2019, with experts in the layers that `moe.layers` names.

    The initial values depend on `seed` and the names of the parameters alone. Arguments and errors are
    those of `Backbone`.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, *, seed: int, **settings: Any) -> None:
        super().__init__(model, moe, seed=seed, **settings)
        self.output = AdaptiveSoftmax(model)
        self.n_routes = 1
        if self.moe_layers:
            self.n_routes = router_class(moe.router.name).routes(resolve_options(moe.router))
        initialize(self, model, seed)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        memory: tuple[torch.Tensor, ...] | None = None,
        *,
        top_k: int | None = None,
        step: int = 0,
        rows: range | None = None,
        span: AttentionSpan | None = None,
        domains_B2: torch.Tensor | None = None,
        return_logits: bool = False,
        trunk: Trunk | None = None,
    ) -> ModelOutput:
        """Read one segment.

        Args:
            input_ids_BS: tokens, int64.
            targets_BS: the tokens that follow them; None computes no loss.
            memory: what the segment before returned; None starts without.
            top_k: experts per token; None means `moe.top_k`.
            step: optimizer steps done, for dropout and policies that change with it.
            rows: rows of the global batch that these B are, for dropout; None means the first ones.
            span: how far back attention reaches; None means as in training.
            domains_B2: source and target domain of each row, 0 where unknown, for policies that look at
                domains; None where the data have none.
            return_logits: also score the whole vocabulary.
            trunk: what a call with another k returned, for the same segment and memory of the layers in it;
                None reads from the embedding on.
        """
        keys_BS = self.token_keys(input_ids_BS, step, rows)
        if self.n_routes > 1 and targets_BS is not None and keys_BS is not None:
            return self._read_by_routes(
                input_ids_BS, targets_BS, memory, keys_BS, return_logits=return_logits,
                top_k=top_k, step=step, span=span, domains_B2=domains_B2, trunk=trunk,
            )  # fmt: skip
        hidden_BSD, memory, routings, trunk = self.read(
            input_ids_BS, memory, top_k=top_k, step=step, span=span, keys_BS=keys_BS,
            domains_B2=domains_B2, trunk=trunk,
        )  # fmt: skip
        loss_BS, logits_BSV = self._score(hidden_BSD, targets_BS, return_logits)
        return ModelOutput(loss_BS, logits_BSV, hidden_BSD, memory, routings, trunk)

    def _read_by_routes(
        self,
        input_ids_BS: torch.Tensor,
        targets_BS: torch.Tensor,
        memory: tuple[torch.Tensor, ...] | None,
        keys_BS: torch.Tensor,
        *,
        return_logits: bool,
        domains_B2: torch.Tensor | None,
        **reading: Any,
    ) -> ModelOutput:
        """All routes of a training step as one batch: the mean of their losses, and how far they differ.

        Hidden states and logits are those of the first route. Each route has its own memory; they stand
        one after the other in [B, R * M, D].
        """
        n_routes, n_rows = self.n_routes, len(input_ids_BS)
        hidden_NSD, memory, routings, _ = self.read(
            repeat_rows(input_ids_BS, n_routes),
            memory and tuple(torch.cat(memory_BMD.chunk(n_routes, 1)) for memory_BMD in memory),
            keys_BS=repeat_keys(keys_BS, n_routes), n_routes=n_routes,
            domains_B2=None if domains_B2 is None else repeat_rows(domains_B2, n_routes), **reading,
        )  # fmt: skip
        loss_NS, logits_NSV = self._score(hidden_NSD, repeat_rows(targets_BS, n_routes), True)
        assert loss_NS is not None and logits_NSV is not None
        routings = with_loss(routings, "consistency", consistency(logits_NSV, n_routes))
        return ModelOutput(
            loss_NS.unflatten(0, (n_routes, n_rows)).mean(0),
            logits_NSV[:n_rows] if return_logits else None,
            hidden_NSD[:n_rows],
            tuple(torch.cat(memory_NMD.chunk(n_routes), 1) for memory_NMD in memory),
            routings,
        )

    def _score(
        self, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor | None, return_logits: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Losses [B, S] if there are targets, and logits [B, S, V] if they are asked for."""
        tables, projections = list(self.embedding.weights), list(self.embedding.projections)
        with room("loss"):
            scored: tuple[torch.Tensor | None, torch.Tensor | None] = self.output(
                hidden_BSD, targets_BS, tables, projections, return_logits=return_logits
            )
        return scored


def _extend(memory_BMD: torch.Tensor, x_BSD: torch.Tensor, memory_len: int) -> torch.Tensor:
    """The last `memory_len` positions of memory and segment, a detached copy."""
    n_new = min(x_BSD.shape[1], memory_len)
    n_old = min(memory_BMD.shape[1], memory_len - n_new)
    old, new = memory_BMD[:, memory_BMD.shape[1] - n_old :], x_BSD[:, x_BSD.shape[1] - n_new :]
    return torch.cat([old, new], dim=1).detach()
