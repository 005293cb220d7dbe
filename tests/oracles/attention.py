"""Relative attention with explicit loops over batch, query, head and key, in double, and in matrices."""

import math

import torch

from megamoe.moe.dropout import Dropout
from megamoe.moe.randomness import draw


def relative_attention(
    context_BCD: torch.Tensor,
    segment_len: int,
    weights: dict[str, torch.Tensor],
    bias_u_AW: torch.Tensor,
    bias_v_AW: torch.Tensor,
    *,
    window: int | None,
    clamp_len: int,
) -> torch.Tensor:
    """Attention of the last positions of a context, [B, S, D].

    `weights` are "qkv" [3 A W, D], "position" [A W, D] and "output" [D, A W]. A query sees itself and
    earlier positions, `window` of them at most; distances above `clamp_len` (0: none) count as that.
    """
    batch, context_len, d_model = context_BCD.shape
    n_heads, d_head = bias_u_AW.shape
    d_inner = n_heads * d_head
    rows = []
    for b in range(batch):
        for i in range(context_len - segment_len, context_len):
            heads = []
            for a in range(n_heads):
                part = slice(a * d_head, (a + 1) * d_head)
                query = weights["qkv"][:d_inner][part] @ context_BCD[b, i]
                scores, values = [], []
                for j in range(i + 1):
                    distance = i - j
                    if window is not None and distance >= window:
                        continue
                    distance = min(distance, clamp_len) if clamp_len else distance
                    key = weights["qkv"][d_inner : 2 * d_inner][part] @ context_BCD[b, j]
                    place = weights["position"][part] @ sinusoid(distance, d_model)
                    score = (query + bias_u_AW[a]) @ key + (query + bias_v_AW[a]) @ place
                    scores.append(score / math.sqrt(d_head))
                    values.append(weights["qkv"][2 * d_inner :][part] @ context_BCD[b, j])
                exponentials = [torch.exp(score - max(scores)) for score in scores]
                total = sum(exponentials)
                heads.append(sum(e / total * value for e, value in zip(exponentials, values, strict=True)))
            rows.append(weights["output"] @ torch.cat(heads))
    return torch.stack(rows).view(batch, segment_len, d_model)


def sinusoid(distance: int, d_model: int) -> torch.Tensor:
    """sin(d w_0), ..., sin(d w_n), cos(d w_0), ..., cos(d w_n), with w_i = 10000^(-2i/D)."""
    angles = [distance / 10000 ** (2 * i / d_model) for i in range(d_model // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


def attention_of_matrices(
    q_ABSW: torch.Tensor,
    k_ABCW: torch.Tensor,
    v_ABCW: torch.Tensor,
    r_APW: torch.Tensor,
    bias_u_AW: torch.Tensor,
    bias_v_AW: torch.Tensor,
    hidden_SC: torch.Tensor,
    dropout: Dropout,
    keys_BS: torch.Tensor | None,
) -> torch.Tensor:
    """Context [A, B, S, W] from projections, in plain operations whose gradient autograd knows.

    `r_APW` belongs to the distances C, ..., 0; `hidden_SC` may be [B, S, C]; each head drops for itself.
    """
    n_heads, _, segment_len, d_head = q_ABSW.shape
    context_len = k_ABCW.shape[2]
    queries_S1 = torch.arange(context_len - segment_len, context_len)[:, None]
    distances_SC = (queries_S1 - torch.arange(context_len)).clamp(min=0)
    products_ABSP = (q_ABSW + bias_v_AW[:, None, None]) @ r_APW[:, None].mT
    places_SC = (context_len - distances_SC).expand(*q_ABSW.shape[:2], -1, -1)
    scores = (q_ABSW + bias_u_AW[:, None, None]) @ k_ABCW.mT + products_ABSP.gather(-1, places_SC)
    lowest = torch.finfo(scores.dtype).min
    scores = (scores / math.sqrt(d_head)).masked_fill(hidden_SC, lowest)
    probabilities = scores.softmax(dim=-1).masked_fill(hidden_SC, 0)
    if dropout.active:
        assert keys_BS is not None
        probabilities = dropout(probabilities, draw(keys_BS, torch.arange(n_heads)[:, None, None]))
    return probabilities @ v_ABCW
