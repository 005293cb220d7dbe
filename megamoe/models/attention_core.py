"""Softmax attention with scores of distances, from queries, keys and values to contexts.

For query i and key j of one head, with a_i = (q_i + u) / sqrt(W), b_i = (q_i + v) / sqrt(W) and r_d the
projected encoding of distance d,

    s_ij = a_i . k_j + b_i . r_{i-j}     p_i = softmax(s_i)     o_i = sum_j dropout(p_ij) v_j

Queries are taken in blocks, of which each meets the keys that its last query may see alone. The scores of a
block become probabilities where they stand, and so do their gradients; for this it is one function of
autograd. Kept are the probabilities, and which of them dropout keeps.

**The shift.** The product of the n queries of a block with the distances P - 1, ..., 0 has rows that should
start n - 1 - i further left for row i. With one more distance than there are keys its rows are one longer
than needed, so that skipping the first n numbers and reading on in rows of P - 1 shifts each row by one more.
What runs over from the next row lies where keys are later than the query, which is hidden anyway.

Shapes: A heads, B batch, S queries, C keys, W width of a head, P = C + 1 distances; G = A * B; n queries and
c keys of one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megamoe.moe.dropout import Dropout, drop_, keep_mask
from megamoe.moe.precision import out_of_autocast
from megamoe.moe.randomness import at_site, draw

QUERY_BLOCK = 128
"""Queries of a block: few enough that little is computed of what the causal mask hides, and that the scores
stay in the cache; many enough for fast products."""


@dataclass(frozen=True)
class Visible:
    """Which keys the queries see, and what dropout leaves of them.

    Attributes:
        hidden_SC: True where query s must not see key c; [B, S, C] where rows are padded.
        causal_alone: nothing is hidden but later keys.
        dropout: on probabilities.
        keys_BS: of the queries' tokens, for dropout; None where nothing is dropped.
    """

    hidden_SC: torch.Tensor
    causal_alone: bool
    dropout: Dropout
    keys_BS: torch.Tensor | None

    def hide_(self, scores_ABnc: torch.Tensor, block: "_Block") -> None:
        """Make the scores of hidden keys as low as can be."""
        if self.causal_alone:  # all others come before the first query of the block
            first = block.n_keys - block.n_queries
            hidden_nn = self.hidden_SC[block.queries, first : block.n_keys]
            scores_ABnc[..., first:].masked_fill_(hidden_nn, -torch.inf)
        elif self.hidden_SC.dim() == 2:
            scores_ABnc.masked_fill_(self._of(block), -torch.inf)
        else:  # a query of padding sees nothing, and the softmax of infinities alone is NaN
            scores_ABnc.masked_fill_(self._of(block), torch.finfo(scores_ABnc.dtype).min)

    def forget_(self, probabilities_ABnc: torch.Tensor, block: "_Block") -> None:
        """Leave a query of padding, which sees nothing, nothing."""
        if self.hidden_SC.dim() == 3:
            probabilities_ABnc.masked_fill_(self._of(block), 0)

    def keep(self, block: "_Block", n_heads: int) -> torch.Tensor | None:
        """Which probabilities [A, B, n, c] dropout keeps; None: all. Each head draws for itself."""
        if self.keys_BS is None:
            return None
        heads_A11 = torch.arange(n_heads, device=self.keys_BS.device)[:, None, None]
        keys_ABn = at_site(draw(self.keys_BS[:, block.queries], heads_A11), self.dropout.site)
        return keep_mask(keys_ABn, block.n_keys, self.dropout.p)

    def _of(self, block: "_Block") -> torch.Tensor:
        return self.hidden_SC[..., block.queries, : block.n_keys]


class Heads(NamedTuple):
    """What attention is computed from.

    Attributes:
        queries: [A, B, S, W].
        keys: [A, B, C, W].
        values: [A, B, C, W].
        distances: [A, P, W], those of the distances C, C - 1, ..., 0.
        bias_u: [A, W].
        bias_v: [A, W].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    distances: torch.Tensor
    bias_u: torch.Tensor
    bias_v: torch.Tensor


def attend(heads: Heads, visible: Visible) -> torch.Tensor:
    """Contexts [A, B, S, W]."""
    with out_of_autocast(*heads) as inputs:
        contexts_ABSW: torch.Tensor = _Attention.apply(*inputs, visible)
        return contexts_ABSW


@dataclass(frozen=True)
class _Block:
    """Some queries in a row, and how many keys the last of them may see."""

    queries: slice
    n_keys: int

    @property
    def n_queries(self) -> int:
        return self.queries.stop - self.queries.start

    def keys_of(self, values_ABCW: torch.Tensor) -> torch.Tensor:
        """[G, c, W]."""
        return values_ABCW.flatten(0, 1)[:, : self.n_keys]

    def queries_of(self, values_ABSW: torch.Tensor) -> torch.Tensor:
        """[G, n, W]."""
        return values_ABSW.flatten(0, 1)[:, self.queries]

    def distances_of(self, values_APW: torch.Tensor) -> torch.Tensor:
        """[A, c + 1, W]."""
        return values_APW[:, -self.n_keys - 1 :]

    def room(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For products [A, B * n, c + 1] of queries with distances, and the same shifted, [A, B, n, c]."""
        n_heads, batch = like.shape[:2]
        products = like.new_empty(n_heads, batch, self.n_queries * (self.n_keys + 1))
        shifted = products[..., self.n_queries :].view(n_heads, batch, self.n_queries, self.n_keys)
        return products.view(n_heads, batch * self.n_queries, self.n_keys + 1), shifted


def _blocks(n_queries: int, n_keys: int) -> Iterator[_Block]:
    for start in range(0, n_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n_queries)
        yield _Block(slice(start, stop), n_keys - n_queries + stop)


def _scaled(queries_ABSW: torch.Tensor, bias_AW: torch.Tensor) -> torch.Tensor:
    return (queries_ABSW + bias_AW[:, None, None]).mul_(queries_ABSW.shape[-1] ** -0.5)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, visible = inputs
        heads = Heads(*tensors)
        contents, places = _scaled(heads.queries, heads.bias_u), _scaled(heads.queries, heads.bias_v)
        contexts = torch.empty_like(heads.queries)
        kept: list[torch.Tensor | None] = []
        for block in _blocks(heads.queries.shape[2], heads.keys.shape[2]):
            products, shifted = block.room(heads.queries)
            queries_AmW = places[:, :, block.queries].flatten(1, 2)
            torch.bmm(queries_AmW, block.distances_of(heads.distances).mT, out=products)
            scores_Gnc = torch.baddbmm(
                shifted.flatten(0, 1), block.queries_of(contents), block.keys_of(heads.keys).mT
            )
            scores = scores_Gnc.view(shifted.shape)
            visible.hide_(scores, block)
            probabilities = _softmax_(scores)
            visible.forget_(probabilities, block)
            keep = visible.keep(block, len(probabilities))
            kept += (probabilities, keep)
            dropped_Gnc = _dropped(probabilities, keep, visible).flatten(0, 1)
            block.queries_of(contexts).copy_(torch.bmm(dropped_Gnc, block.keys_of(heads.values)))
        ctx.save_for_backward(*heads, *kept)
        ctx.visible = visible
        return contexts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcontexts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        heads, kept = Heads(*ctx.saved_tensors[:6]), iter(ctx.saved_tensors[6:])
        visible: Visible = ctx.visible
        contents, places = _scaled(heads.queries, heads.bias_u), _scaled(heads.queries, heads.bias_v)
        dcontents, dplaces = torch.empty_like(heads.queries), torch.empty_like(heads.queries)
        dkeys, dvalues = torch.zeros_like(heads.keys), torch.zeros_like(heads.values)
        ddistances = torch.zeros_like(heads.distances)
        dcontexts = dcontexts.contiguous()
        for block in _blocks(heads.queries.shape[2], heads.keys.shape[2]):
            probabilities, keep = next(kept), next(kept)
            dcontexts_GnW = block.queries_of(dcontexts)
            dropped_Gnc = _dropped(probabilities, keep, visible).flatten(0, 1)
            block.keys_of(dvalues).baddbmm_(dropped_Gnc.mT, dcontexts_GnW)
            dscores_Gnc = torch.bmm(dcontexts_GnW, block.keys_of(heads.values).mT)
            dscores = dscores_Gnc.view(probabilities.shape)
            if keep is not None:
                drop_(dscores, keep, visible.dropout.p)
            _softmax_backward_(dscores, probabilities)
            dproducts, shifted = block.room(heads.queries)
            shifted.copy_(dscores)
            dproducts.view((*shifted.shape[:2], -1))[..., : block.n_queries].zero_()
            block.keys_of(dkeys).baddbmm_(dscores_Gnc.mT, block.queries_of(contents))
            block.queries_of(dcontents).copy_(torch.bmm(dscores_Gnc, block.keys_of(heads.keys)))
            dplaces_AmW = torch.bmm(dproducts, block.distances_of(heads.distances))
            dplaces[:, :, block.queries] = dplaces_AmW.unflatten(1, (-1, block.n_queries))
            queries_AmW = places[:, :, block.queries].flatten(1, 2)
            block.distances_of(ddistances).baddbmm_(dproducts.mT, queries_AmW)
        scale = heads.queries.shape[-1] ** -0.5
        dbias_u, dbias_v = (d.sum((1, 2)).mul_(scale) for d in (dcontents, dplaces))
        return dcontents.add_(dplaces).mul_(scale), dkeys, dvalues, ddistances, dbias_u, dbias_v, None


def _dropped(probabilities: torch.Tensor, keep: torch.Tensor | None, visible: Visible) -> torch.Tensor:
    return probabilities if keep is None else drop_(probabilities.clone(), keep, visible.dropout.p)


def _softmax_(scores: torch.Tensor) -> torch.Tensor:
    """In place; exponentials and their sum are computed in fp32 or wider."""
    return torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def _softmax_backward_(gradient: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """In place, p * (g - sum g p); sums are computed in fp32 or wider."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, probabilities, -1, probabilities.dtype, grad_input=gradient
    )
