"""Floating-point operations of matrix products, counted as torch.utils.flop_counter does.

These are two for each multiply-add; by room of a step, as `--profile` tells them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megamoe.errors import ConfigError
from megamoe.models.attention import QUERY_BLOCK
from megamoe.models.cross_entropy import LOGITS_AT_ONCE
from megamoe.models.embeddings import needs_projections, vocabulary_clusters, vocabulary_tables
from megamoe.moe.products import Product
from megamoe.moe.routers import router_class
from megamoe.plan.vocabulary import cluster_shares
from megamoe.plan.workload import Workload, layer_spec, router_options

FP32_ROOM = "routing"
"""Computed in fp32 whatever the precision of the run."""


class Work(NamedTuple):
    """Operations of one micro-batch; `repeated` is what checkpointing computes again of the forward pass."""

    forward: float
    backward: float
    repeated: float

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.forward + self.backward + self.repeated


@dataclass(frozen=True)
class Flops:
    """Of one rank.

    Attributes:
        rooms: what a micro-batch takes, by room.
        per_token_forward: for one token, forward.
        per_step: one optimizer step.
        model_per_step: the same without what activation checkpointing repeats, by which the ratio of the peak
            is counted.
    """

    rooms: dict[str, Work]
    per_token_forward: float
    per_step: float
    model_per_step: float


def flops(load: Workload) -> Flops:
    """Count one step of `load`'s layout.

    Raises:
        ConfigError: the policy does not tell what it multiplies.
    """
    rooms = {"attention": _attention(load), "loss": _loss(load)} | _feed_forwards(load)
    if embedding := list(_embedding(load)):
        rooms["embedding"] = _work(embedding)
    accumulation = load.layout.accumulation
    streams = load.layout.micro_batch_size * load.run.model.segment_len
    return Flops(
        rooms,
        sum(work.forward for work in rooms.values()) / streams,
        accumulation * sum(work.total for work in rooms.values()),
        accumulation * sum(work.forward + work.backward for work in rooms.values()),
    )


def query_key_pairs(load: Workload) -> int:
    """Scores that one head computes for one row: a block of queries sees the keys that its last may see."""
    segment_len = load.run.model.segment_len
    pairs = 0
    for start in range(0, segment_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, segment_len)
        pairs += (stop - start) * (load.context - segment_len + stop)
    return pairs


def _work(products: Iterable[Product], repeated: Iterable[Product] = ()) -> Work:
    products = list(products)
    return Work(
        sum(product.forward for product in products),
        sum(product.backward for product in products),
        sum(product.forward for product in repeated),
    )


def _times(work: Work, count: int) -> Work:
    return Work(*(count * part for part in work))


def _repeated(load: Workload, products: list[Product]) -> list[Product]:
    """Those of a sublayer that are computed again; the last only if something after it is kept."""
    if not load.run.training.activation_checkpointing:
        return []
    model = load.run.model
    return products[:-1] if model.pre_norm and not model.dropout else products


def _attention(load: Workload) -> Work:
    """Projections of segment, context, distances; scores by content and distance, values; output."""
    model = load.run.model
    width, inner, rows = model.d_model, model.n_heads * model.d_head, load.batch * load.context
    matrices, pairs = model.n_heads * load.batch, query_key_pairs(load)
    products = [
        Product(load.tokens, width, inner),
        Product(rows, width, 2 * inner),
        Product(load.context + 1, width, inner, gradients=1),
        Product(matrices * pairs, model.d_head, 1),
        Product(matrices * (pairs + model.segment_len), model.d_head, 1),
        Product(matrices * pairs, model.d_head, 1),
        Product(load.tokens, inner, width),
    ]
    return _times(_work(products, _repeated(load, products)), model.n_layers)


def _feed_forwards(load: Workload) -> dict[str, Work]:
    """Of the layers with experts, and of those without."""
    rooms: dict[str, Work] = {}
    model, dense = load.run.model, load.run.model.n_layers - load.mixtures
    if dense:
        products = [
            Product(load.tokens, model.d_model, model.d_inner),
            Product(load.tokens, model.d_inner, model.d_model),
        ]
        rooms["feed_forward"] = _times(_work(products, _repeated(load, products)), dense)
    if load.mixtures:
        policy = _times(_work(_policy(load)), load.mixtures)
        if load.has_experts:
            rooms |= {FP32_ROOM: policy, "experts": _times(_experts(load), load.mixtures)}
        else:
            below = rooms.get("feed_forward", Work(0, 0, 0))
            rooms["feed_forward"] = Work(*(a + b for a, b in zip(below, policy, strict=True)))
    return rooms


def _policy(load: Workload) -> list[Product]:
    name = load.run.moe.router.name
    products = router_class(name).products(router_options(load.run), layer_spec(load.run), load.tokens)
    if products is None:
        raise ConfigError(
            f"moe.router.name = {name!r}: does not tell what it multiplies; give the policy Router.products"
        )
    return products


def _experts(load: Workload) -> Work:
    """Both layers of each chosen expert. Biases have products of their own: one-hot ones if grouped."""
    width, hidden, local = load.run.model.d_model, load.run.moe.d_expert, load.local_experts
    rows = load.tokens * load.choices + load.row_padding
    products = [Product(rows, width, hidden), Product(rows, hidden, width)]
    if load.grouped:
        products += [Product(rows, local, hidden, gradients=1), Product(rows, local, width, gradients=1)]
        return _work(products, _all_repeated(load, products))
    forward, backward, repeated = _work(products, _all_repeated(load, products))
    return Work(forward, backward + 2 * load.tokens * load.copies * width * local, repeated)


def _all_repeated(load: Workload, products: list[Product]) -> list[Product]:
    return products if load.run.training.activation_checkpointing else []


def _embedding(load: Workload) -> Iterator[Product]:
    """Projections of narrow embeddings to the model's width."""
    model = load.run.model
    if needs_projections(model):
        tables = vocabulary_tables(model)
        shares = cluster_shares(model) if len(tables) > 1 else [1.0]
        for table, share in zip(tables, shares, strict=True):
            yield Product(load.tokens * share, table.width, model.d_model)


def _loss(load: Workload) -> Work:
    """Logits of each cluster for its tokens; of the first, and of the classes of the others, for all."""
    total = Work(0, 0, 0)
    for rows, width, symbols in scored_clusters(load):
        logits = Product(rows, width, symbols)
        forward, backward = logits.forward, logits.backward
        if rows * symbols > LOGITS_AT_ONCE:
            backward += forward  # they are made again
        if needs_projections(load.run.model):
            projection = Product(rows, load.run.model.d_model, width)
            forward, backward = forward + projection.forward, backward + projection.backward
        total = Work(total.forward + forward, total.backward + backward, 0)
    if load.batch > load.layout.micro_batch_size:  # two passes are compared by the logits of all symbols
        every = [Product(load.tokens, width, symbols) for _, width, symbols in scored_clusters(load)]
        total = Work(*(a + b for a, b in zip(total, _work(every), strict=True)))
    return total


def scored_clusters(load: Workload) -> Iterator[tuple[float, int, int]]:
    """Rows, width and symbols of each product with the output layer."""
    model = load.run.model
    clusters = vocabulary_clusters(model)
    for i, (cluster, share) in enumerate(zip(clusters, cluster_shares(model), strict=True)):
        rows = load.tokens * (share if i else 1.0)
        yield rows, cluster.width, cluster.size + (0 if i else len(clusters) - 1)
