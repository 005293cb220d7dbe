"""Relative attention with memory (Dai et al., Transformer-XL, ACL 2019, section 3.3).

For query i and key j, with W the width of a head and r_d the projected encoding of distance d,

    score_ij = ((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(W)

over memory and segment, where u and v are two vectors per head that all layers share.

Shapes besides the common ones: A attention heads, W width of one head, C = M + S context positions
(memory, then segment), P = C + 1 distances. The sums over keys are in `attention_core`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.errors import ConfigError
from megamoe.models.attention_core import DroppedUnits, Hidden, relative_attention
from megamoe.models.key_value_cache import KeyValueCache
from megamoe.moe.dropout import Dropout
from megamoe.moe.randomness import at_site, draw

# Queries that share the keys they may see; smaller blocks cut off more of what the causal mask hides.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class AttentionSpan:
    """How far back attention reaches. Evaluation may use another span than training.

    Attributes:
        memory_len: positions M kept from earlier segments.
        same_length: every token sees exactly the `memory_len` latest positions, itself included, and
            not also what else its segment and the memory hold.
        clamp_len: distances above it count as `clamp_len`; 0 tells all apart.
    """

    memory_len: int
    same_length: bool = False
    clamp_len: int = 0

    def __post_init__(self) -> None:
        if self.same_length and self.memory_len == 0:
            raise ConfigError(
                "model.same_length = True: needs model.memory_len above 0, the length that all tokens see"
            )


class AttentionInputs(NamedTuple):
    """What the attention of every layer shares.

    Attributes:
        distances_PD: encodings of the distances C, C - 1, ..., 0.
        hidden_SC: True where query s must not see key c; [B, S, C] where rows are padded.
        bias_u_AW: u of the score, added to queries that meet keys.
        bias_v_AW: v of the score, added to queries that meet distances.
        keys_BS: keys of the segment's tokens, for dropout; None in evaluation.
        hides_later_only: whether `hidden_SC` hides nothing but later keys, so that attention can skip others.
        cache: where one layer keeps keys, values and projected distances of a context of which it is given
            the newest position alone; None where it is given all.
    """

    distances_PD: torch.Tensor
    hidden_SC: torch.Tensor
    bias_u_AW: torch.Tensor
    bias_v_AW: torch.Tensor
    keys_BS: torch.Tensor | None = None
    hides_later_only: bool = False
    cache: KeyValueCache | None = None


def inverse_frequencies(d_model: int, device: torch.device | None = None) -> torch.Tensor:
    """1 / 10000^(2i/D) for i in 0, ..., D/2 - 1, in fp32."""
    return 1 / 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float32, device=device) / d_model)


def encode_distances(context_len: int, d_model: int, clamp_len: int, like: torch.Tensor) -> torch.Tensor:
    """Sinusoids of the distances C, C - 1, ..., 0: sines, then cosines, of d / 10000^(2i/D).

    The first is one further than any query sees; see `_shift`.

    Returns:
        [C + 1, D] in the type and on the device of `like`.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    distances_P = torch.arange(context_len, -1, -1, device=like.device, dtype=wide)
    if clamp_len > 0:
        distances_P = distances_P.clamp(max=clamp_len)
    angles = torch.outer(distances_P, inverse_frequencies(d_model, like.device).to(wide))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


def hide_keys(segment_len: int, context_len: int, span: AttentionSpan, device: torch.device) -> torch.Tensor:
    """The mask [S, C], True where a key is later than its query or beyond the span; see `hide_padding`."""
    keys_C = torch.arange(context_len, device=device)
    distance_SC = keys_C[context_len - segment_len :, None] - keys_C
    hidden_SC = distance_SC < 0
    return hidden_SC | (distance_SC >= span.memory_len) if span.same_length else hidden_SC


def hide_padding(hidden_SC: torch.Tensor, padding_BC: torch.Tensor) -> torch.Tensor:
    """The mask [B, S, C] that also hides the positions of padding, as keys and as queries."""
    segment_len = hidden_SC.shape[0]
    return hidden_SC | padding_BC[:, None, :] | padding_BC[:, -segment_len:, None]


class QueryKeyValue(nn.Module):
    """Queries of the segment, keys and values of the whole context, from one weight [3 A W, D]."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.weight = nn.Parameter(torch.empty(3 * n_heads * d_head, d_model))

    def forward(self, context_BCD: torch.Tensor, segment_len: int) -> tuple[torch.Tensor, ...]:
        """Project.

        Returns:
            queries [A, B, S, W], keys and values [A, B, C, W]. Heads come first, so that the batch
            folds into the rows of the products with distances, which have no batch.
        """
        d_inner = self.weight.shape[0] // 3
        query_weight, key_value_weight = self.weight.split([d_inner, 2 * d_inner])
        queries_BSI = linear(context_BCD[:, -segment_len:], query_weight)
        keys_BCI, values_BCI = linear(context_BCD, key_value_weight).chunk(2, dim=-1)
        return tuple(
            x.unflatten(-1, (self.n_heads, -1)).permute(2, 0, 1, 3).contiguous()
            for x in (queries_BSI, keys_BCI, values_BCI)
        )


class RelativeAttention(nn.Module):
    """Multi-head relative attention of a segment over memory and itself. No norm, no residual.

    Args:
        d_model: model width D.
        n_heads: attention heads A.
        d_head: width W of one head; A * W need not be D.
        dropout: dropout on attention probabilities.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, dropout: Dropout) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = QueryKeyValue(d_model, n_heads, d_head)
        self.position = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.output = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(self, context_BCD: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """Attend from the last S positions of the context, [B, S, D]."""
        segment_len = inputs.hidden_SC.shape[-2]
        q_ABSW, k_ABCW, v_ABCW = self.qkv(context_BCD, segment_len)
        if inputs.cache is None:
            r_APW = self.project_distances(inputs.distances_PD)
        else:
            k_ABCW, v_ABCW, r_APW = inputs.cache.append(k_ABCW, v_ABCW)
        context_ABSW = relative_attention(
            q_ABSW,
            k_ABCW,
            v_ABCW,
            r_APW,
            inputs.bias_u_AW,
            inputs.bias_v_AW,
            Hidden(inputs.hidden_SC, inputs.hides_later_only),
            self._dropped(inputs.keys_BS),
            QUERY_BLOCK,
        )
        return self.output(context_ABSW.permute(1, 2, 0, 3).flatten(2))

    def project_distances(self, distances_PD: torch.Tensor) -> torch.Tensor:
        """r of the score for each head, [A, P, W]."""
        r_APW: torch.Tensor = self.position(distances_PD).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
        return r_APW

    def _dropped(self, keys_BS: torch.Tensor | None) -> DroppedUnits | None:
        """Dropout of probabilities; each head draws for itself."""
        if not self.dropout.active:
            return None
        assert keys_BS is not None, "dropout in training: give AttentionInputs.keys_BS"
        heads_A = torch.arange(self.n_heads, device=keys_BS.device)
        keys_ABS = draw(keys_BS, heads_A[:, None, None])
        return DroppedUnits(at_site(keys_ABS, self.dropout.site), self.dropout.p)
