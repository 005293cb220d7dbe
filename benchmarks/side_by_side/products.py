"""Bare matrix products: the floor under what a layer made of them can take.

The shapes are those of a layer's forward and backward pass, run one after the other on the same operands
again and again: no routing, no activations, no copies, nothing to compile for new shapes.

Shapes: N rows, D model width, F hidden width, A heads, W width of a head, S segment, C context.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megamoe.config import RunConfig

QUERY_BLOCK = 128
"""Queries of a block share the keys that they may see: 81 % of the area where memory is as long as the
segment, and the least that is known to pay."""


@dataclass(frozen=True)
class Product:
    """`batch` products of [m, k] with [k, n], all of it `times` times."""

    m: int
    k: int
    n: int
    times: int = 1
    batch: int = 1


class Products:
    """Products in one type, with operands made before the time is taken."""

    def __init__(self, products: Iterable[Product], dtype: torch.dtype) -> None:
        self._calls = [
            (
                product.times,
                torch.randn(product.batch, product.m, product.k).to(dtype),
                torch.randn(product.batch, product.k, product.n).to(dtype),
                torch.empty(product.batch, product.m, product.n, dtype=dtype),
            )
            for product in products
        ]

    def __call__(self) -> None:
        """Run them."""
        for times, left, right, out in self._calls:
            for _ in range(times):
                if len(left) == 1:
                    torch.mm(left[0], right[0], out=out[0])
                else:
                    torch.bmm(left, right, out=out)


def linear(rows: int, d_in: int, d_out: int, times: int = 1) -> Iterator[Product]:
    """A linear map of `rows` rows and its two gradients."""
    yield Product(rows, d_in, d_out, times)
    yield Product(rows, d_out, d_in, times)
    yield Product(d_out, rows, d_in, times)


def mixture(run: RunConfig, tokens: int, top_k: int) -> Iterator[Product]:
    """The experts of one layer, with as many rows for each."""
    rows = tokens * top_k // run.moe.n_experts
    yield from linear(rows, run.model.d_model, run.moe.d_expert, run.moe.n_experts)
    yield from linear(rows, run.moe.d_expert, run.model.d_model, run.moe.n_experts)


def projections(run: RunConfig, batch: int, queries_of_memory: bool = False) -> Iterator[Product]:
    """Queries, keys, values, distances and output of one attention layer.

    Args:
        queries_of_memory: project them too, as published, although nothing reads them.
    """
    model = run.model
    inner, segment, context = (
        model.n_heads * model.d_head,
        model.segment_len,
        model.segment_len + model.memory_len,
    )
    yield from linear(batch * (context if queries_of_memory else segment), model.d_model, inner)
    yield from linear(batch * context, model.d_model, 2 * inner)
    yield from linear(context, model.d_model, inner)
    yield from linear(batch * segment, inner, model.d_model)


def attention(run: RunConfig, batch: int) -> Iterator[Product]:
    """Scores of contents and distances, and their use, of one attention layer; causal, in blocks."""
    model = run.model
    heads, width = model.n_heads, model.d_head
    for start in range(0, model.segment_len, QUERY_BLOCK):
        queries = min(QUERY_BLOCK, model.segment_len - start)
        keys = model.memory_len + start + queries
        # q k, q r, dP = dy v; p v, dq = dS k, dq = dS r; dk, dv, dr.
        yield Product(queries, width, keys, times=3, batch=heads * batch)
        yield Product(queries, keys, width, times=3, batch=heads * batch)
        yield Product(keys, queries, width, times=3, batch=heads * batch)


def step(run: RunConfig, batch: int, top_k: int) -> Iterator[Product]:
    """A whole training step without its optimizer."""
    model, tokens = run.model, batch * run.model.segment_len
    for _ in range(model.n_layers):
        yield from projections(run, batch)
        yield from attention(run, batch)
    for _ in run.moe.layer_indices(model.n_layers):
        yield from mixture(run, tokens, top_k)
        yield from linear(tokens, model.d_model, run.moe.n_experts)
    yield from linear(tokens, model.d_model, model.vocab_size)
