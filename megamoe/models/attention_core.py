"""The core of relative attention, from projections to context, as one function with its own gradient.

For query i and key j of one head, with a_i = (q_i + u) / sqrt(W), b_i = (q_i + v) / sqrt(W),

    s_ij = a_i . k_j + b_i . r_{i-j}    p_i = softmax(s_i), 0 where keys are hidden
    e_ij = p_ij, negative where dropout drops it
    o_i = sum_j max(e_ij, 0) v_j / (1 - p_drop)

and backwards, with g = do / (1 - p_drop),

    dv_j = sum_i max(e_ij, 0) g_i
    dp_ij = g_i . v_j where e_ij > 0    ds_ij = p_ij (dp_ij - p_i . dp_i)
    da_i = sum_j ds_ij k_j              dk_j = sum_i ds_ij a_i
    db_i = sum_j ds_ij r_{i-j}          dr_d = sum_i ds_{i,i-d} b_i

Beside the inputs e is all that is kept, its sign being the mask of dropout. The work is done in pieces:
blocks of queries share the keys that the last of them may see, which cuts off most of what the causal mask
hides; and on a CPU one piece stays in the cache of a core from its scores to its products.

Shapes besides the common ones: A attention heads, W width of one head, G = A B matrices, one for each head
and row, C = M + S context positions (memory, then segment), P = C + 1 distances; in a piece: N queries, J
keys, and its own A heads, B rows and G matrices only.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megamoe import kernels
from megamoe.moe.dropout import dropped_levels, keep_mask, rescale

# On a CPU the scores of one piece should stay in the cache of a core.
SCORES_AT_ONCE = {"cpu": 1 << 19}
MOST_SCORES_AT_ONCE = 1 << 26


class Hidden(NamedTuple):
    """Which keys queries must not see.

    Attributes:
        mask_SC: True where query s must not see key c; [B, S, C] where rows are padded.
        later_only: whether nothing is hidden but keys later than their query, which saves looking at others.
    """

    mask_SC: torch.Tensor
    later_only: bool


class DroppedUnits(NamedTuple):
    """Dropout of probabilities.

    Attributes:
        keys_ABS: keys of the queries at this place of the model, from which `keep_mask` draws.
        p: probability.
    """

    keys_ABS: torch.Tensor
    p: float

    @property
    def gain(self) -> float:
        """What the units that are kept are multiplied by."""
        return rescale(self.p)


class _Group(NamedTuple):
    """Matrices that are computed at once: several heads only with all rows."""

    heads: slice
    rows: slice
    matrices: slice

    @property
    def n_heads(self) -> int:
        return self.heads.stop - self.heads.start


class _Block(NamedTuple):
    """N queries, and how many keys J the last of them may see."""

    queries: slice
    n_keys: int

    @property
    def n_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def keys(self) -> slice:
        return slice(self.n_keys)

    @property
    def distances(self) -> slice:
        """J, J - 1, ..., 0."""
        return slice(-self.n_keys - 1, None)


def relative_attention(
    q_ABSW: torch.Tensor,
    k_ABCW: torch.Tensor,
    v_ABCW: torch.Tensor,
    r_APW: torch.Tensor,
    bias_u_AW: torch.Tensor,
    bias_v_AW: torch.Tensor,
    hidden: Hidden,
    dropped: DroppedUnits | None,
    query_block: int,
) -> torch.Tensor:
    """Context [A, B, S, W] of the queries, as the head of this file defines it.

    Args:
        q_ABSW: queries.
        k_ABCW: keys.
        v_ABCW: values.
        r_APW: projected encodings of the distances C, C - 1, ..., 0. No query sees distance C.
        bias_u_AW: u.
        bias_v_AW: v.
        hidden: which keys are hidden.
        dropped: dropout of probabilities; None for none.
        query_block: queries N of one piece.
    """
    # Outside of the function, which would save these parameters where ZeRO may take them apart meanwhile.
    content_ABSW, position_ABSW = _scaled(q_ABSW, bias_u_AW), _scaled(q_ABSW, bias_v_AW)
    tensors = (content_ABSW, position_ABSW, k_ABCW, v_ABCW, r_APW)
    with torch.autocast(q_ABSW.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return _attend(*tensors, hidden, dropped, query_block, kept=None)
        context_ABSW: torch.Tensor = _RelativeAttention.apply(*tensors, hidden, dropped, query_block)
        return context_ABSW


def _scaled(q_ABSW: torch.Tensor, bias_AW: torch.Tensor) -> torch.Tensor:
    """Queries are scaled, and not scores, which are many more; under autocast biases are wider than they."""
    return (q_ABSW + bias_AW[:, None, None].to(q_ABSW.dtype)) * q_ABSW.shape[-1] ** -0.5


class _RelativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        content_ABSW: torch.Tensor,
        position_ABSW: torch.Tensor,
        k_ABCW: torch.Tensor,
        v_ABCW: torch.Tensor,
        r_APW: torch.Tensor,
        hidden: Hidden,
        dropped: DroppedUnits | None,
        query_block: int,
    ) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        tensors = content_ABSW, position_ABSW, k_ABCW, v_ABCW, r_APW
        context_ABSW = _attend(*tensors, hidden, dropped, query_block, kept)
        ctx.dropped, ctx.query_block = dropped, query_block
        ctx.save_for_backward(*tensors, *kept)
        return context_ABSW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ABSW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        content_ABSW, position_ABSW, k_ABCW, v_ABCW, r_APW, *kept = ctx.saved_tensors
        if ctx.dropped is not None:
            g_ABSW = g_ABSW * ctx.dropped.gain
        a_GSW, b_GSW, g_GSW = (x.flatten(0, 1) for x in (content_ABSW, position_ABSW, g_ABSW))
        k_GCW, v_GCW = k_ABCW.flatten(0, 1), v_ABCW.flatten(0, 1)
        d_a_GSW, d_b_GSW, d_k_GCW, d_v_GCW = (torch.empty_like(x) for x in (a_GSW, b_GSW, k_GCW, v_GCW))
        d_r_APW = _zero_sums(r_APW)

        blocks = list(_blocks(content_ABSW, k_ABCW, ctx.query_block))
        for group in _groups(content_ABSW, k_ABCW, ctx.query_block):
            here = group.matrices
            sums_k_GCW, sums_v_GCW = _zero_sums(k_GCW[here]), _zero_sums(v_GCW[here])
            for block, e_GNJ in zip(blocks, kept, strict=True):
                g_GNW = g_GSW[here, block.queries]
                d_p_GNJ = _product(g_GNW, v_GCW[here, block.keys].contiguous().mT)
                padded = _room_for_products(d_p_GNJ, group)
                shifted_GNJ = _shifted(padded, d_p_GNJ.shape)
                kept_GNJ, d_s_GNJ = _softmax_backward(d_p_GNJ, e_GNJ[here], ctx.dropped, shifted_GNJ)
                sums_v_GCW[:, block.keys] += _product(kept_GNJ.mT, g_GNW)
                sums_k_GCW[:, block.keys] += _product(d_s_GNJ.mT, a_GSW[here, block.queries])
                d_a_GSW[here, block.queries] = _product(d_s_GNJ, k_GCW[here, block.keys])
                d_products = padded[..., : block.n_keys + 1]
                b = _rows_together(b_GSW[here, block.queries], group)
                d_b = _product(d_products, r_APW[group.heads, block.distances])
                d_b_GSW[here, block.queries] = d_b.view_as(g_GNW)
                d_r_APW[group.heads, block.distances] += _product(d_products.mT, b)
            d_k_GCW[here], d_v_GCW[here] = sums_k_GCW, sums_v_GCW

        d_queries = d_a_GSW.view_as(content_ABSW), d_b_GSW.view_as(content_ABSW)
        d_keys = d_k_GCW.view_as(k_ABCW), d_v_GCW.view_as(v_ABCW), d_r_APW.to(r_APW.dtype)
        return *d_queries, *d_keys, None, None, None


def _attend(
    content_ABSW: torch.Tensor,
    position_ABSW: torch.Tensor,
    k_ABCW: torch.Tensor,
    v_ABCW: torch.Tensor,
    r_APW: torch.Tensor,
    hidden: Hidden,
    dropped: DroppedUnits | None,
    query_block: int,
    kept: list[torch.Tensor] | None,
) -> torch.Tensor:
    """The context; appends e of each block of queries, [G, N, J], to `kept`."""
    a_GSW, b_GSW, k_GCW, v_GCW = (x.flatten(0, 1) for x in (content_ABSW, position_ABSW, k_ABCW, v_ABCW))
    context_GSW = torch.empty_like(a_GSW)
    blocks = list(_blocks(content_ABSW, k_ABCW, query_block))
    if kept is not None:
        kept += (k_GCW.new_empty(len(k_GCW), block.n_queries, block.n_keys) for block in blocks)
    for group in _groups(content_ABSW, k_ABCW, query_block):
        here = group.matrices
        for i, block in enumerate(blocks):
            s_GNJ = _product(a_GSW[here, block.queries], k_GCW[here, block.keys].contiguous().mT)
            b = _rows_together(b_GSW[here, block.queries], group)
            shifted_GNJ = _shifted_product(b, r_APW[group.heads, block.distances], s_GNJ.shape)
            out = None if kept is None else kept[i][here]
            e_GNJ = _softmax_drop(s_GNJ, shifted_GNJ, hidden, dropped, group, block, out)
            context_GSW[here, block.queries] = _product(e_GNJ, v_GCW[here, block.keys])
    if dropped is not None:
        context_GSW.mul_(dropped.gain)
    return context_GSW.view_as(content_ABSW)


def _blocks(q_ABSW: torch.Tensor, k_ABCW: torch.Tensor, query_block: int) -> Iterator[_Block]:
    segment_len, context_len = q_ABSW.shape[2], k_ABCW.shape[2]
    for start in range(0, segment_len, query_block):
        stop = min(start + query_block, segment_len)
        yield _Block(slice(start, stop), context_len - segment_len + stop)


def _groups(q_ABSW: torch.Tensor, k_ABCW: torch.Tensor, query_block: int) -> Iterator[_Group]:
    """As many matrices at a time as `SCORES_AT_ONCE` allows, but one at least."""
    n_heads, batch, segment_len, _ = q_ABSW.shape
    most_scores = SCORES_AT_ONCE.get(q_ABSW.device.type, MOST_SCORES_AT_ONCE)
    at_once = max(1, most_scores // max(1, min(query_block, segment_len) * k_ABCW.shape[2]))
    heads_at_once, rows_at_once = max(1, at_once // batch), min(at_once, batch)
    for head in range(0, n_heads, heads_at_once):
        heads = slice(head, min(head + heads_at_once, n_heads))
        for row in range(0, batch, rows_at_once):
            rows = slice(row, min(row + rows_at_once, batch))
            yield _Group(heads, rows, slice(head * batch + row, (heads.stop - 1) * batch + rows.stop))


def _softmax_drop(
    scores_GNJ: torch.Tensor,
    shifted_GNJ: torch.Tensor,
    hidden: Hidden,
    dropped: DroppedUnits | None,
    group: _Group,
    block: _Block,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """max(e, 0) from the two parts of the scores, the first of which may be written to; e itself to `out`."""
    keys_GN = None if dropped is None else dropped.keys_ABS.flatten(0, 1)[group.matrices, block.queries]
    p = 0.0 if dropped is None else dropped.p
    if hidden.later_only and kernels.take(scores_GNJ):
        keys_GN = None if keys_GN is None else keys_GN.contiguous()
        torch.ops.megamoe.softmax_drop_(scores_GNJ, shifted_GNJ, keys_GN, dropped_levels(p), out)
        return scores_GNJ
    scores_GNJ += shifted_GNJ
    e_GNJ = _softmax(scores_GNJ, hidden, group, block, out)
    if keys_GN is None:
        return e_GNJ
    keep_GNJ = keep_mask(keys_GN, block.n_keys, p)
    return e_GNJ.mul_(keep_GNJ.view(torch.int8).mul_(2).sub_(1)).relu()


def _softmax(
    scores_GNJ: torch.Tensor, hidden: Hidden, group: _Group, block: _Block, out: torch.Tensor | None
) -> torch.Tensor:
    """Probabilities of the keys, 0 where they are hidden; a query of padding, which sees none, gets 0 alone.

    Whatever the type, exponentials and their sum are computed in fp32 or wider.
    """
    first = block.n_keys - block.n_queries if hidden.later_only else 0
    mask = hidden.mask_SC[..., block.queries, first : block.n_keys]
    if mask.dim() == 2:
        scores_GNJ[..., first:].masked_fill_(mask, -torch.inf)
        return torch.softmax(scores_GNJ, -1, out=out)
    mask, of_rows = mask[group.rows], (group.n_heads, -1)
    lowest = torch.finfo(scores_GNJ.dtype).min  # of rows of infinities the softmax and its gradient are NaN
    scores_GNJ.unflatten(0, of_rows).masked_fill_(mask, lowest)
    probabilities_GNJ = torch.softmax(scores_GNJ, -1, out=out)
    probabilities_GNJ.unflatten(0, of_rows).masked_fill_(mask, 0)
    return probabilities_GNJ


def _softmax_backward(
    d_p_GNJ: torch.Tensor, e_GNJ: torch.Tensor, dropped: DroppedUnits | None, shifted_GNJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(e, 0) and ds, from dp as it would be without dropout, which may be written to.

    ds goes to `shifted_GNJ` too.
    """
    if kernels.take(d_p_GNJ):
        kept_GNJ = e_GNJ if dropped is None else torch.empty_like(e_GNJ)
        out = None if dropped is None else kept_GNJ
        torch.ops.megamoe.softmax_drop_backward_(d_p_GNJ, e_GNJ, shifted_GNJ, out)
        return kept_GNJ, d_p_GNJ
    if dropped is None:
        kept_GNJ, p_GNJ = e_GNJ, e_GNJ
    else:
        kept_GNJ, p_GNJ = e_GNJ.relu(), e_GNJ.abs()
        d_p_GNJ = torch.ops.aten.threshold_backward(d_p_GNJ, kept_GNJ, 0)
    d_s_GNJ = torch._softmax_backward_data(d_p_GNJ, p_GNJ, -1, p_GNJ.dtype)
    shifted_GNJ.copy_(d_s_GNJ)
    return kept_GNJ, d_s_GNJ


def _rows_together(x_GNW: torch.Tensor, group: _Group) -> torch.Tensor:
    """[A, B N, W]: distances are the same in all rows, so that heads alone need products of their own."""
    return x_GNW.reshape(group.n_heads, -1, x_GNW.shape[-1])


def _shifted_product(queries: torch.Tensor, r_APW: torch.Tensor, shape_GNJ: torch.Size) -> torch.Tensor:
    """Products of queries [A, B N, W] with distances, [G, N, J], column j for the distance to key j.

    See `_shifted`. What runs over from the next row lies where keys are later than the query, which is
    hidden anyway.
    """
    padded = queries.new_empty(*queries.shape[:2], _padded(r_APW.shape[1]))
    products = padded[..., : r_APW.shape[1]]
    if len(queries) == 1:
        torch.mm(queries[0], r_APW[0].mT, out=products[0])
    else:
        torch.bmm(queries, r_APW.mT, out=products)
    return _shifted(padded, shape_GNJ)


def _room_for_products(scores_GNJ: torch.Tensor, group: _Group) -> torch.Tensor:
    """Room for gradients of the plain products, [A, B N, L]: what `_shifted` does not show of it is 0.

    What it shows of the next row must be 0 as well, as gradients of hidden scores are.
    """
    n_matrices, n_queries, n_keys = scores_GNJ.shape
    n_rows = n_matrices // group.n_heads * n_queries
    padded = scores_GNJ.new_empty(group.n_heads, n_rows, _padded(n_keys + 1))
    padded[..., :n_queries] = 0
    return padded


def _shifted(padded: torch.Tensor, shape_GNJ: torch.Size) -> torch.Tensor:
    """View [G, N, J] of plain products [A, B N, L], of which the first J + 1 columns count.

    Row i of the plain product holds distances J, ..., 0 where it should start N - 1 - i further left.
    Skipping the first N numbers and reading on in rows of L - 1 shifts each row by one more, without a
    copy.
    """
    _, n_queries, _ = shape_GNJ
    length = padded.shape[-1]
    return padded.as_strided(shape_GNJ, (n_queries * length, length - 1, 1), n_queries)


def _padded(length: int) -> int:
    """Length of rows that starts them where memory is read fastest."""
    return -(-length // 64) * 64


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched product, without the copies that `matmul` makes of slices, and `bmm` of a batch of one."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _zero_sums(x: torch.Tensor) -> torch.Tensor:
    """Room for a gradient that is a sum over blocks of queries, therefore in fp32 or wider."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
