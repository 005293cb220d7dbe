"""Relative attention in its classic form, in plain torch, written anew from the paper's equations.

Dai et al., "Transformer-XL", ACL 2019, section 3.3 and appendix B, in the form that published code computes:
time comes first, queries of the memory are projected too and not used, scores [i, j, B, A] come from two
einsums, and those of distances are shifted by a column of zeros, a view with one row more, and a view back.

Shapes: B batch, S segment, C context, D model width, A heads, W width of a head.
"""

import torch
from torch import nn
from torch.nn import functional


class ClassicAttention(nn.Module):
    """The attention of a segment over its context; parameters are named as `RelativeAttention`'s."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_head
        self.qkv = nn.Linear(d_model, 3 * n_heads * d_head, bias=False)
        self.position = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.output = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(
        self,
        context_CBD: torch.Tensor,
        distances_CD: torch.Tensor,
        hidden_SC: torch.Tensor,
        bias_u_AW: torch.Tensor,
        bias_v_AW: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from the last S positions, [S, B, D].

        Args:
            distances_CD: encodings of the distances C - 1, ..., 0.
            hidden_SC: True where a query must not see a key.
        """
        n_queries = len(hidden_SC)
        q, k, v = (self._heads(x) for x in self.qkv(context_CBD).chunk(3, dim=-1))
        q, r = q[-n_queries:], self._heads(self.position(distances_CD))
        content = torch.einsum("ibad,jbad->ijba", q + bias_u_AW, k)
        place = _shift(torch.einsum("ibad,jad->ijba", q + bias_v_AW, r))
        scores = ((content + place) * self.d_head**-0.5).float()
        scores = scores.masked_fill(hidden_SC[:, :, None, None], -torch.inf).to(q.dtype)
        y = torch.einsum("ijba,jbad->ibad", scores.softmax(dim=1), v)
        return self.output(y.flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, self.d_head))


def _shift(scores_IJBA: torch.Tensor) -> torch.Tensor:
    """Row i moved left, so that the score of distance i - j comes to stand in column j."""
    n_queries, n_keys, *rest = scores_IJBA.shape
    padded = functional.pad(scores_IJBA, (0, 0, 0, 0, 1, 0))
    return padded.view(n_keys + 1, n_queries, *rest)[1:].view(n_queries, n_keys, *rest)


class PlainAttention(nn.Module):
    """torch's `scaled_dot_product_attention`, which knows no distances: another function, and a floor."""

    def __init__(self, d_model: int, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.key_value = nn.Linear(d_model, 2 * n_heads * d_head, bias=False)
        self.output = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(self, context_BCD: torch.Tensor, hidden_SC: torch.Tensor) -> torch.Tensor:
        """Attend from the last S positions, [B, S, D]."""
        queries = self._heads(self.query(context_BCD[:, -len(hidden_SC) :]))
        keys, values = (self._heads(x) for x in self.key_value(context_BCD).chunk(2, dim=-1))
        y = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=~hidden_SC)
        return self.output(y.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
