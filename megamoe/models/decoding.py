"""Reading a text token by token, each at the same cost, however many came before.

A text is read in segments as long as those of training, then token by token. Every token sees the
C = `span.memory_len` latest positions, itself included, so that where segments begin and how long they are
does not matter (but to policies that look at it): the scores are those of one pass over the whole text.

Shapes besides the common ones: A attention heads, W width of one head, C positions that a token sees.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from megamoe.models.attention import AttentionInputs, AttentionSpan, encode_distances
from megamoe.models.block import Block
from megamoe.models.key_value_cache import KeyValueCache
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routing import RouterContext


class Past(NamedTuple):
    """A text as its reader remembers it.

    Attributes:
        memory: L tensors [1, M, D].
        n_tokens: its length.
    """

    memory: tuple[torch.Tensor, ...]
    n_tokens: int


@torch.no_grad()
def read_text(
    model: TransformerXL, ids_S: torch.Tensor, span: AttentionSpan, *, top_k: int, step: int
) -> Past:
    """Read a text, which may be empty; arguments as for `Decoder`."""
    config = model.model_config
    memory = (model.attention_bias_u.new_zeros(1, 0, config.d_model),) * config.n_layers
    for start in range(0, len(ids_S), config.segment_len):
        segment_1S = ids_S[None, start : start + config.segment_len]
        memory = model(segment_1S, memory=memory, top_k=top_k, step=step, span=span).memory
    return Past(memory, len(ids_S))


class Decoder:
    """Reads one more token in each of B rows at a time.

    Args:
        model: in evaluation mode.
        pasts: what each row has read; their lengths may differ.
        span: how far back attention reaches; with `same_length`.
        top_k: experts per token.
        step: optimizer steps behind the model, for policies that change with it.
    """

    def __init__(
        self, model: TransformerXL, pasts: Sequence[Past], span: AttentionSpan, *, top_k: int, step: int
    ) -> None:
        assert span.same_length, "what a token sees must not depend on where segments begin"
        self.model = model
        like, n_places = model.attention_bias_u, span.memory_len
        places_C = torch.arange(n_places, device=like.device)
        self._lengths_B = torch.tensor([past.n_tokens for past in pasts], device=like.device)
        self._inputs = AttentionInputs(
            encode_distances(n_places, model.model_config.d_model, span.clamp_len, like),
            # Rows end at the last place; the first ones of shorter rows are empty.
            hidden_SC=(places_C < n_places - self._lengths_B[:, None])[:, None],
            bias_u_AW=model.attention_bias_u,
            bias_v_AW=model.attention_bias_v,
        )
        self._context = RouterContext(
            step=step,
            seed=model.seed,
            top_k=top_k,
            sequence_T=torch.arange(len(pasts), device=like.device),
            n_sequences=len(pasts),
        )
        self._layers: list[Any] = list(model.layers)
        memories = zip(*(past.memory for past in pasts), strict=True)
        self._caches = list(map(self._cache, self._layers, memories))
        self._n_read = 0

    @torch.no_grad()
    def read(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Read the next token of every row.

        Returns:
            [B, V] scores of what follows it, fp32 logits (log probabilities with an adaptive softmax).
        """
        model = self.model
        self._inputs.hidden_SC[..., self._n_read % self._inputs.hidden_SC.shape[-1]] = False
        x_BSD = model.embedding(ids_B[:, None])
        no_memory = x_BSD[:, :0]
        places_B = (self._lengths_B + self._n_read) % model.model_config.segment_len
        context = replace(self._context, token_ids_T=ids_B, place_T=places_B)
        self._n_read += 1
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x_BSD = layer.attend(x_BSD, no_memory, self._inputs._replace(cache=cache))
            x_BSD, routing = layer.apply_feed_forward(x_BSD, None, context)
            if routing is not None:
                context = replace(context, previous=routing)
        tables, projections = list(model.embedding.weights), list(model.embedding.projections)
        _, logits_BSV = model.output(x_BSD, None, tables, projections, return_logits=True)
        return logits_BSV[:, -1]

    @torch.no_grad()
    def _cache(self, layer: Block, memories_1MD: Sequence[torch.Tensor]) -> KeyValueCache:
        """The layer's ring with what the rows remember."""
        r_APW = layer.attention.project_distances(self._inputs.distances_PD)
        n_heads, n_distances, d_head = r_APW.shape
        n_places = n_distances - 1
        shape = (n_heads, len(memories_1MD), n_places, d_head)
        keys_ABCW, values_ABCW = r_APW.new_zeros(shape), r_APW.new_zeros(shape)
        for row, memory_1MD in enumerate(memories_1MD):
            keys_A1MW, values_A1MW = layer.project(memory_1MD)
            start = n_places - memory_1MD.shape[1]
            keys_ABCW[:, row, start:] = keys_A1MW[:, 0]
            values_ABCW[:, row, start:] = values_A1MW[:, 0]
        return KeyValueCache(keys_ABCW, values_ABCW, r_APW)
