"""Held-out text scored at every number of active experts, on any number of ranks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.data.stream import TokenStream
from megamoe.errors import ConfigError, DataError
from megamoe.models.attention import AttentionSpan
from megamoe.models.transformer_xl import ModelOutput, Trunk
from megamoe.moe.routers import resolve_options, router_class
from megamoe.parallel.launch import World

NO_EXPERTS = 0
"""The k under which a model without mixture layers files its one figure."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one split at each k.

    Attributes:
        corpus: honest name of the text, which goes with every figure.
        split: "valid" or "test".
        metric: unit the corpus is reported in, "bpc" or "ppl".
        tokens: predictions behind each figure.
        nats: mean loss per token by k, in nats.
        words_per_token: for subwords, words of the split per token; None otherwise.
    """

    corpus: str
    split: str
    metric: str
    tokens: int
    nats: dict[int, float]
    words_per_token: float | None = None

    def selection(self, top_k: int) -> float:
        """What is compared at `top_k` to find the best checkpoint; the lowest is best."""
        return self.figure(top_k)

    def figure(self, top_k: int) -> float:
        """The loss at `top_k` in the corpus' own metric."""
        return in_metric(self.nats[top_k], self.metric)

    def word_perplexity(self, top_k: int) -> float | None:
        """exp of the nats per word, for subwords: comparable between tokenizers; None for other units."""
        if self.words_per_token is None:
            return None
        return _exp(self.nats[top_k] / self.words_per_token)

    def cells(self, top_k: int) -> dict[str, str]:
        """What a table says about `top_k`, by the title of the column."""
        cells = {
            self.metric: format_figure(self.figure(top_k), self.metric).split()[0],
            "nats per token": f"{self.nats[top_k]:.4f}",
        }
        per_word = self.word_perplexity(top_k)
        return cells if per_word is None else cells | {"ppl per word": f"{per_word:.2f}"}

    def metrics(self) -> dict[str, float]:
        """Named ``split/loss_k4``, ``split/bpc_k4``, for metrics.jsonl."""
        result: dict[str, float] = {}
        for top_k, nats in self.nats.items():
            suffix = f"_k{top_k}" if top_k != NO_EXPERTS else ""
            result[f"{self.split}/loss{suffix}"] = nats
            result[f"{self.split}/{self.metric}{suffix}"] = self.figure(top_k)
            per_word = self.word_perplexity(top_k)
            if per_word is not None:
                result[f"{self.split}/word_ppl{suffix}"] = per_word
        return result

    def to_dict(self) -> dict[str, Any]:
        """For results.json: everything needed to quote the figures."""
        values: dict[str, Any] = {
            "corpus": self.corpus,
            "split": self.split,
            "metric": self.metric,
            "tokens": self.tokens,
            "loss_by_k": {str(k): nats for k, nats in self.nats.items()},
            f"{self.metric}_by_k": {str(k): self.figure(k) for k in self.nats},
        }
        if self.words_per_token is not None:
            values["words_per_token"] = self.words_per_token
            values["word_ppl_by_k"] = {str(k): self.word_perplexity(k) for k in self.nats}
        return values


def in_metric(nats: float, metric: str) -> float:
    """A loss of `nats` as bits per symbol ("bpc"), as perplexity ("ppl") or as it is ("loss")."""
    if metric == "loss":
        return nats
    return nats / math.log(2) if metric == "bpc" else _exp(nats)


def format_figure(value: float, metric: str) -> str:
    """ "1.2345 bpc", "23.45 ppl", "0.1234 nats" or "81.20 %"."""
    if metric == "accuracy":
        return f"{100 * value:.2f} %"
    if metric == "loss":
        return f"{value:.4f} nats"
    return f"{value:.4f} {metric}" if metric == "bpc" else f"{value:.2f} {metric}"


def top_ks_to_score(run: RunConfig, wanted: Iterable[int]) -> tuple[int, ...]:
    """The k among `wanted` that this model can run, rising; (NO_EXPERTS,) if it has no mixture layers.

    A policy that does not follow k is scored once, at the number of experts it takes.

    Raises:
        ConfigError: every wanted k is above the number of experts.
    """
    if not run.moe.layer_indices(run.model.n_layers):
        return (NO_EXPERTS,)
    wanted = tuple(wanted)
    experts_per_token = router_class(run.moe.router.name).experts_per_token
    kept = sorted({experts_per_token(k, run.moe.n_experts) for k in wanted if k <= run.moe.n_experts})
    if not kept:
        raise ConfigError(f"evaluation.top_ks = {wanted}: name a k up to moe.n_experts = {run.moe.n_experts}")
    return tuple(kept)


def best_k(run: RunConfig) -> int:
    """The k whose validation loss decides which weights are best.

    Unless `evaluation.best_k` says it, that is the one k that a run is trained with, or all experts where k
    changes, as published.

    Raises:
        ConfigError: there are fewer experts.
    """
    moe, asked = run.moe, run.evaluation.best_k
    if not isinstance(asked, int):
        asked = moe.top_k if moe.schedule.mode == "constant" else moe.n_experts
    if asked > moe.n_experts:
        raise ConfigError(f"evaluation.best_k = {asked}: name a k up to moe.n_experts = {moe.n_experts}")
    return top_ks_to_score(run, [asked])[0]


def require_causal(run: RunConfig) -> None:
    """Refuse to score a language model whose routing looks ahead, unless the run says that this is known.

    Raises:
        ConfigError: the policy is causal in no mode, and `evaluation.allow_noncausal` is off.
    """
    looks_ahead = router_class(run.moe.router.name).causal == "never"
    if looks_ahead and not run.task.name and not run.evaluation.allow_noncausal:
        raise ConfigError(
            f"moe.router.name = {run.moe.router.name!r}: its choices depend on later tokens, so its figures"
            " are no language model's; take another policy, or set evaluation.allow_noncausal=true"
        )


def require_known_domains(run: RunConfig, corpus: Corpus) -> None:
    """Refuse domains that the policy was not built for.

    Raises:
        DataError: the text has one.
    """
    known = router_class(run.moe.router.name).n_domains(resolve_options(run.moe.router))
    for split, domains in (corpus.domains or {}).items():
        if known and domains.largest > known:
            raise DataError(
                f"data.domains = {run.data.domains!r}: {split} has domain {domains.largest}, but"
                f" moe.router.domains = {known}; set that to {domains.largest} or more"
            )


def evaluation_span(run: RunConfig) -> AttentionSpan:
    """What attention sees at evaluation; `evaluation.memory_len = auto` keeps the span of training.

    Raises:
        ConfigError: every token is to see equally many positions of a memory that has none.
    """
    asked = run.evaluation.memory_len
    span_of_training = run.model.memory_len + run.model.segment_len
    memory_len = asked if isinstance(asked, int) else max(0, span_of_training - run.evaluation.segment_len)
    if run.evaluation.same_length and memory_len == 0:
        raise ConfigError(
            f"evaluation.same_length = True: evaluation.memory_len = {asked!r} leaves no"
            " memory, whose length it takes; set evaluation.memory_len above 0"
        )
    return AttentionSpan(
        memory_len=memory_len,
        same_length=run.evaluation.same_length,
        clamp_len=run.evaluation.clamp_len,
    )


def evaluate(
    model: Callable[..., ModelOutput],
    corpus: Corpus,
    split: str,
    top_ks: Iterable[int],
    run: RunConfig,
    world: World,
    *,
    step: int = 0,
    max_tokens: int = 0,
    after_segment: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score `split` by the published protocol: contiguous streams with memory, each token weighing the same.

    Every rank calls this and gets the same result. Each runs the same number of forward passes on the
    same number of rows; where rows do not divide, some ranks score copies with weight 0.

    The text is read once. Each k has its own memory above the trunk of the model; the trunk is computed once
    per segment. Figures equal, bit for bit, those of one pass for each k.

    Args:
        model: in evaluation mode; a `TransformerXL` or an engine's ``forward``.
        corpus: the text.
        split: "valid" or "test".
        top_ks: numbers of active experts to score at.
        run: for the shapes of training, which the default memory depends on, and `run.evaluation`.
        world: the ranks that share the rows.
        step: optimizer steps behind the model.
        max_tokens: score at most about this many tokens (whole segments, at least one); 0 scores all.
        after_segment: called after each forward pass, one for each segment and k, at the same places on all
            ranks.
    """
    rows = _Rows.of_rank(run.evaluation.batch_size, world.rank, world.world_size)
    stream = TokenStream(
        corpus.tokens[split],
        batch_size=run.evaluation.batch_size,
        segment_len=run.evaluation.segment_len,
        rows=rows.read,
        domains=corpus.domains_of(split),
    )
    n_segments = stream.n_segments
    if max_tokens:
        per_segment = run.evaluation.batch_size * run.evaluation.segment_len
        n_segments = min(n_segments, max(1, max_tokens // per_segment))
    totals, n_predictions = _total_losses(
        model, stream, n_segments, rows, world.device,
        top_ks=top_ks, step=step, span=evaluation_span(run), after_segment=after_segment,
    )  # fmt: skip
    tokens = n_predictions * run.evaluation.batch_size
    nats = {top_k: float(world.sum(total)) / tokens for top_k, total in totals.items()}
    words = corpus.words_per_token[split] if corpus.words_per_token else None
    return Evaluation(corpus.name, split, corpus.metric, tokens, nats, words)


@dataclass(frozen=True)
class _Rows:
    """This rank's share of the evaluation rows.

    Attributes:
        read: rows to read, never none.
        index: which of the read rows fills each place of the batch, [B].
        weights_B: 1 where the place is this rank's to score, 0 where it is a filler.
    """

    read: range
    index: list[int]
    weights_B: torch.Tensor

    @classmethod
    def of_rank(cls, n_rows: int, rank: int, world_size: int) -> "_Rows":
        n_places = -(-n_rows // world_size)
        places = range(rank * n_places, (rank + 1) * n_places)
        clamped = [min(place, n_rows - 1) for place in places]
        weights_B = torch.tensor([float(place < n_rows) for place in places], dtype=torch.float64)
        return cls(range(clamped[0], clamped[-1] + 1), [row - clamped[0] for row in clamped], weights_B)


@torch.no_grad()
def _total_losses(
    model: Callable[..., ModelOutput],
    stream: TokenStream,
    n_segments: int,
    rows: _Rows,
    device: torch.device,
    *,
    top_ks: Iterable[int],
    step: int,
    span: AttentionSpan,
    after_segment: Callable[[], None],
) -> tuple[dict[int, torch.Tensor], int]:
    """This rank's sum of token losses by k (float64 scalars), and the predictions made in one row."""
    weights_B = rows.weights_B.to(device)
    totals = {top_k: torch.zeros((), dtype=torch.float64, device=device) for top_k in top_ks}
    memories: dict[int, tuple[torch.Tensor, ...]] = {}
    n_predictions = 0
    for segment in range(n_segments):
        batch = stream.batch(segment)
        input_ids_BS = batch.input_ids_BS[rows.index].to(device)
        targets_BS = batch.targets_BS[rows.index].to(device)
        domains_B2 = None if batch.domains_B2 is None else batch.domains_B2[rows.index].to(device)
        trunk: Trunk | None = None
        for top_k in totals:
            output = model(
                input_ids_BS, targets_BS, memories.get(top_k),
                top_k=None if top_k == NO_EXPERTS else top_k, step=step, span=span,
                domains_B2=domains_B2, trunk=trunk,
            )  # fmt: skip
            memories[top_k], trunk = output.memory, output.trunk
            assert output.loss_BS is not None
            totals[top_k] += output.loss_BS.double().sum(dim=1) @ weights_B
            after_segment()
        n_predictions += targets_BS.shape[1]
    return totals, n_predictions


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
