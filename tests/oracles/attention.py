"""Relative attention with explicit loops over batch, query, head and key, in double."""

import math

import torch


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
