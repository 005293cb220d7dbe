"""Labelled sentences scored at every number of active experts, on any number of ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamoe.config.schema import RunConfig
from megamoe.data.sentences import SentenceBatch, Sentences, SentenceSet, make_batch
from megamoe.models.classifier import ClassifierOutput
from megamoe.models.transformer_xl import Trunk
from megamoe.parallel.launch import World
from megamoe.training.evaluation import NO_EXPERTS, Evaluation, evaluation_span

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927): good near 0 and 1 and for few trials."""
    p, z2 = correct / total, Z * Z / total
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


@dataclass(frozen=True, kw_only=True)
class Accuracy(Evaluation):
    """Accuracy of one split at each k. `tokens` counts sentences, `nats` are per sentence.

    Attributes:
        correct: sentences classified rightly, by k.
        n_classes: classes to choose from.
        overlap: sentences of the split that were trained on too.
    """

    correct: dict[int, int]
    n_classes: int
    overlap: int

    def figure(self, top_k: int) -> float:
        """Share of sentences classified rightly."""
        return self.correct[top_k] / self.tokens

    def selection(self, top_k: int) -> float:
        """Share of sentences classified wrongly."""
        return 1 - self.figure(top_k)

    def cells(self, top_k: int) -> dict[str, str]:
        """Accuracy, its interval and the loss."""
        low, high = wilson_interval(self.correct[top_k], self.tokens)
        return {
            "accuracy": f"{100 * self.figure(top_k):.2f} %",
            "95 % interval": f"{100 * low:.2f} to {100 * high:.2f} %",
            "nats": f"{self.nats[top_k]:.4f}",
        }

    def metrics(self) -> dict[str, float]:
        """Named ``split/loss_k4``, ``split/accuracy_k4``, for metrics.jsonl."""
        result: dict[str, float] = {}
        for top_k, nats in self.nats.items():
            suffix = f"_k{top_k}" if top_k != NO_EXPERTS else ""
            result |= {
                f"{self.split}/loss{suffix}": nats,
                f"{self.split}/accuracy{suffix}": self.figure(top_k),
            }
        return result

    def to_dict(self) -> dict[str, Any]:
        """For results.json: everything needed to quote the figures."""
        return {
            "corpus": self.corpus,
            "split": self.split,
            "metric": self.metric,
            "sentences": self.tokens,
            "classes": self.n_classes,
            "also_in_training": self.overlap,
            "loss_by_k": {str(k): nats for k, nats in self.nats.items()},
            "accuracy_by_k": {str(k): self.figure(k) for k in self.nats},
            "interval_95_by_k": {str(k): wilson_interval(n, self.tokens) for k, n in self.correct.items()},
        }


def evaluate_sentences(
    model: Callable[..., ClassifierOutput],
    text: SentenceSet,
    split: str,
    top_ks: Iterable[int],
    run: RunConfig,
    world: World,
    *,
    step: int = 0,
    after_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Score every sentence of `text[split]` once at each k, without gradient, the same on all ranks.

    Every rank must call this; all make equally many forward passes of equal length. The sentences are read
    once, as `evaluate` reads text.

    Args:
        model: called as `Classifier` is; in evaluation mode.
        text: the sentences.
        split: "valid" or "test".
        top_ks: from `megamoe.training.evaluation.top_ks_to_score`.
        run: gives `evaluation` and the lengths of training, which the default memory depends on.
        world: the ranks that share the sentences.
        step: optimizer steps behind the model.
        after_batch: called after each forward pass, one for each batch and k, at the same places on all
            ranks.
    """
    sentences = text.splits[split]
    totals = _score(model, sentences, run, world, top_ks=top_ks, step=step, after_batch=after_batch)
    correct, nats = {}, {}
    for top_k, total in totals.items():
        n_correct, loss = world.sum(total).tolist()
        correct[top_k], nats[top_k] = round(n_correct), loss / len(sentences)
    return Accuracy(
        corpus=text.name, split=split, metric=text.metric, tokens=len(sentences), nats=nats, correct=correct,
        n_classes=len(text.labels), overlap=text.overlaps[split].shared,
    )  # fmt: skip


@torch.no_grad()
def _score(
    model: Callable[..., ClassifierOutput],
    sentences: Sentences,
    run: RunConfig,
    world: World,
    *,
    top_ks: Iterable[int],
    step: int,
    after_batch: Callable[[], None],
) -> dict[int, torch.Tensor]:
    """This rank's number of right answers and sum of losses by k, [2] in float64."""
    span, device = evaluation_span(run), world.device
    totals = {top_k: torch.zeros(2, dtype=torch.float64, device=device) for top_k in top_ks}
    memories: dict[int, tuple[Any, Any]] = dict.fromkeys(totals, (None, None))
    # Without memory the order does not matter, and sentences of equal length need no padding.
    for batch, weights_B in _batches(
        sentences, run.evaluation.batch_size, world, in_order=span.memory_len > 0
    ):
        input_ids_BS, padding_BS, labels_B = (values.to(device) for values in batch[:3])
        trunk: Trunk | None = None
        for top_k in totals:
            output = model(
                input_ids_BS, padding_BS, labels_B, *memories[top_k],
                top_k=None if top_k == NO_EXPERTS else top_k, step=step, span=span, trunk=trunk,
            )  # fmt: skip
            memories[top_k], trunk = (output.memory, output.memory_padding_BM), output.trunk
            assert output.loss_B is not None
            right_B = output.logits_BC.argmax(dim=-1) == labels_B
            totals[top_k] += torch.stack([right_B.double(), output.loss_B.double()]) @ weights_B.to(device)
            after_batch()
    return totals


def _batches(
    sentences: Sentences, batch_size: int, world: World, *, in_order: bool
) -> Iterator[tuple[SentenceBatch, torch.Tensor]]:
    """This rank's rows of each batch, and 1 for each that is to be scored, 0 for fillers."""
    n_places = -(-batch_size // world.world_size)
    rows = [min(world.rank * n_places + place, batch_size - 1) for place in range(n_places)]
    is_ours = [world.rank * n_places + place < batch_size for place in range(n_places)]
    order = np.arange(len(sentences))
    if not in_order:
        order = np.argsort([len(ids) for ids in sentences.ids], kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        n_real = len(indices)
        indices = np.pad(indices, (0, batch_size - n_real), mode="edge")
        weights = [float(ours and row < n_real) for row, ours in zip(rows, is_ours, strict=True)]
        yield (
            make_batch(sentences, indices, rows, starts_epoch=start == 0),
            torch.tensor(weights, dtype=torch.float64),
        )
