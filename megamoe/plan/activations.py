"""Bytes that one micro-batch keeps for its backward pass, and what it works in beside them.

Counted by component from what each keeps: distinct storages, without parameters. What experts keep of tokens
from other ranks is in `megamoe.plan.exchange`. GPUs keep more than CPUs, because torch differentiates
their grouped products one by one.
"""

from dataclasses import dataclass, replace

from megamoe.models.attention import QUERY_BLOCK
from megamoe.models.attention_core import MOST_SCORES_AT_ONCE, SCORES_AT_ONCE
from megamoe.models.cross_entropy import LOGITS_AT_ONCE
from megamoe.models.embeddings import needs_projections
from megamoe.moe.routers import router_class
from megamoe.plan.flops import query_key_pairs, scored_clusters
from megamoe.plan.workload import Workload, checkpointing, layer_spec, router_options

WIDE = 4
"""Bytes of fp32, in which routing, sums and losses are computed."""
INDEX = 8
"""Bytes of an index or a key."""
TABLES = 2
"""[T, E] of a policy: logits, and their softmax or what takes its place."""
PIECES = 3
"""Of a piece of attention: gradients of probabilities, of scores, and these shifted; two masks more."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank.

    Attributes:
        kept: at the end of the forward pass of a micro-batch, without what the loss keeps.
        working: the most that the loss, or the backward pass of one sublayer, then needs beside what is left.
        scores: of `kept`, probabilities of attention.
    """

    kept: int
    working: int
    scores: int

    @property
    def peak(self) -> int:
        """In the backward pass."""
        return self.kept + self.working


def activations(load: Workload) -> Activations:
    """Of a micro-batch under the checkpointing that the run asks for."""
    sublayers, mixtures = _Sublayers(load), load.run.moe.layer_indices(load.run.model.n_layers)
    recomputes = load.run.training.activation_checkpointing
    names = [
        name
        for layer in range(load.run.model.n_layers)
        for name in ("attention", "mixture" if layer in mixtures else "feed_forward")
    ]
    whole = {name: sublayers.kept(name) for name in set(names)}
    staying = {name: sublayers.checkpointed(name) if recomputes else whole[name] for name in whole}
    kept = alive = sublayers.ends() + sum(staying[name] for name in names)
    peak = kept + loss_bytes(load)
    for name in reversed(names):  # what a sublayer has kept is gone when its gradients are done
        peak = max(peak, alive + whole[name] - staying[name] + sublayers.gradients(name))
        alive -= staying[name]
    scores = 0 if recomputes else load.run.model.n_layers * sublayers.scores()
    return Activations(int(kept), int(peak - kept), int(scores))


def without_checkpointing(load: Workload) -> Activations:
    """What the same micro-batch keeps if nothing is computed again."""
    return activations(replace(load, run=checkpointing(load.run, False)))


def with_checkpointing(load: Workload) -> Activations:
    """What it keeps if attention, dense networks and experts are computed again."""
    return activations(replace(load, run=checkpointing(load.run, True)))


class _Sublayers:
    """Bytes of each kind of sublayer of `load`."""

    def __init__(self, load: Workload) -> None:
        model = load.run.model
        self.load, self.model, self.b = load, model, load.itemsize
        self.tokens, self.width = load.tokens, model.d_model
        self.rows = load.batch * load.context
        self.inner = model.n_heads * model.d_head
        self.stream = self.tokens * self.width * self.b
        self.mask = self.tokens * self.width if model.dropout else 0
        self.choices = self.tokens * load.choices

    def kept(self, name: str) -> float:
        """What a sublayer keeps of which nothing is computed again."""
        kinds = {"attention": self.attention, "feed_forward": self.feed_forward, "mixture": self.mixture}
        return kinds[name]()

    def ends(self) -> float:
        """Of embedding and output: ids, keys, masks, encodings of distances, what the output layer reads."""
        encodings = (self.load.context + 1) * self.width * self.b
        hidden = self.stream + self.mask if self.model.dropout else self.stream
        return 3 * INDEX * self.tokens + self.mask + encodings + hidden

    def scores(self) -> float:
        """Probabilities, with the mask of dropout in their signs."""
        return self.load.batch * self.model.n_heads * query_key_pairs(self.load) * self.b

    def attention(self) -> float:
        """Context, projections, probabilities, what the output layer reads; dropout, residual and norm."""
        context = self.rows * self.width * self.b
        kept = 2 * context + self._statistics(self.rows) if self.model.pre_norm else context
        if self.load.batch > 1:
            kept += self.stream  # the rows of the segment are not contiguous in the context
        queries, keys = self.tokens * self.inner * self.b, self.rows * self.inner * self.b
        distances = (self.load.context + 1) * self.inner * self.b
        kept += 3 * queries + 2 * keys + distances + self.scores()
        if self.model.attention_dropout:
            kept += INDEX * self.tokens * self.model.n_heads
        return kept + self._after()

    def feed_forward(self) -> float:
        """Input, hidden units, and where they drop."""
        hidden = self.tokens * self.model.d_inner
        return self._before() + hidden * (self.b + (1 + self.b if self.model.dropout else 0)) + self._after()

    def mixture(self) -> float:
        """Input, what routing keeps, choices and hidden units."""
        kept = self._before() + self._after()
        if not self.load.has_experts:
            return kept + self._owned()
        return kept + self._routing() + self._experts()

    def checkpointed(self, name: str) -> float:
        """What stays of a sublayer that is computed again: its input; its memory is counted elsewhere."""
        if name != "mixture":
            return self.stream
        outside = self._before() + self._after()
        if not self.load.has_experts:
            return outside + self._owned()
        return outside + self._routing() + (INDEX + WIDE) * self.choices

    def gradients(self, name: str) -> float:
        """What the backward pass of a sublayer works in."""
        if name == "attention":
            at_once = SCORES_AT_ONCE["cpu"] if not self.load.on_gpu else MOST_SCORES_AT_ONCE
            most = self.load.batch * self.model.n_heads * QUERY_BLOCK * self.load.context
            pieces = PIECES + (2 if self.model.attention_dropout else 0)
            inner = (3 * self.tokens + 2 * self.rows) * self.inner * self.b
            return inner + pieces * min(at_once, most) * self.b + 2 * self.stream
        if name == "feed_forward":
            return 2 * self.tokens * self.model.d_inner * self.b + 2 * self.stream
        if self.load.grouped:
            per_choice = self.width * (self.b + WIDE) + 2 * self.load.run.moe.d_expert * self.b
            return self.choices * per_choice + 2 * self.stream
        return 2 * WIDE * self.tokens * self.width + 2 * self.stream

    def _statistics(self, rows: float) -> float:
        return 2 * WIDE * rows

    def _before(self) -> float:
        """The input, and where the norm comes first what it was made from."""
        return 2 * self.stream + self._statistics(self.tokens) if self.model.pre_norm else self.stream

    def _after(self) -> float:
        """Mask of dropout, and where the norm comes last what it reads."""
        return self.mask + (0 if self.model.pre_norm else self.stream + self._statistics(self.tokens))

    def _routing(self) -> float:
        """The tokens in fp32 where they are not, tables of all experts, and weights of the chosen."""
        load = self.load
        products = router_class(load.run.moe.router.name).products(
            router_options(load.run), layer_spec(load.run), load.tokens
        )
        # Each product that looks at the tokens widens them for itself.
        looks = sum(one.rows == load.tokens and one.inner == self.width for one in products or ())
        wide = looks * WIDE * self.tokens * self.width if self.b < WIDE else 0
        tables = TABLES * WIDE * self.tokens * load.run.moe.n_experts if looks else 0
        return wide + tables + (INDEX + WIDE) * self.choices

    def _experts(self) -> float:
        """What all choices keep, and rows of padding."""
        padding = self.load.row_padding * self.load.run.moe.d_expert * self.b
        return self.choices * kept_per_choice(self.load) + padding

    def _owned(self) -> float:
        """Of policies that are a network of their own: hidden units twice, and what is kept of them."""
        load = self.load
        cls = router_class(load.run.moe.router.name)
        products = cls.products(router_options(load.run), layer_spec(load.run), load.tokens) or []
        hidden = max((product.rows * product.columns for product in products), default=0)
        return hidden * (2 * self.b + (2 if self.model.dropout else 1))


def kept_per_choice(load: Workload) -> float:
    """Order, token, expert and key of a choice, its weight, its hidden units, and if grouped its rows.

    These are the rows that grouped products read, and those that are summed, in fp32; hidden units are there
    as ReLU and as dropout leave them.
    """
    moe, b = load.run.moe, load.itemsize
    named = 4 * INDEX + WIDE
    if not load.grouped:
        return named + moe.d_expert * b
    hidden = moe.d_expert * (2 * b + (1 if load.run.model.dropout else 0))
    return named + load.run.model.d_model * (b + WIDE) + hidden + load.local_experts * b


def loss_bytes(load: Workload) -> float:
    """What the loss keeps and works in: logits in fp32 and their gradients, of all tokens or of some.

    Where they are made for some tokens at a time, those of the part before are still there.
    """
    most = 0.0
    narrow = load.itemsize if load.itemsize < WIDE else 0
    for rows, width, symbols in scored_clusters(load):
        if rows * symbols <= LOGITS_AT_ONCE:
            most = max(most, rows * symbols * (3 * WIDE + narrow))
        else:
            gradients = symbols * width * WIDE
            most = max(most, 2 * LOGITS_AT_ONCE * (WIDE + narrow) + gradients)
    if needs_projections(load.run.model):
        most += load.tokens * load.run.model.d_model * load.itemsize
    return most
