"""What trains a classifier: the loop of `Trainer`, over labelled sentences."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.transfer import transfer_weights
from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.data.overlap import to_text
from megamoe.data.sentences import SentenceBatch, SentenceSet, SentenceStream, make_batch
from megamoe.errors import CheckpointError
from megamoe.moe.routing import Routing
from megamoe.training.accuracy import Accuracy, evaluate_sentences
from megamoe.training.banner import batch_row, model_rows, run_row, schedule_rows
from megamoe.training.trainer import Trainer

_ORDER_OF_SENTENCES = (
    ("task", "name"), ("task", "labels"), ("task", "bucket"),
    ("training", "batch_size"), ("training", "seed"),
)  # fmt: skip


class ClassifierTrainer(Trainer):
    """Fine-tunes the language model of `run.task.checkpoint`; arguments and attributes are `Trainer`'s.

    `corpus` is a `SentenceSet`. `best_figure` is the lowest share of validation sentences classified
    wrongly, with all experts.
    """

    def _open_stream(self) -> SentenceStream:
        training = self.run.training
        return SentenceStream(
            self.corpus.splits["train"],
            batch_size=training.batch_size,
            rows=self.engine.rows,
            seed=training.seed,
            bucket=self.run.task.bucket,
        )

    def describe(self) -> dict[str, str]:
        """Names and values for the banner."""
        run, text, evaluation = self.run, self.corpus, self.run.evaluation
        sizes = ", ".join(f"{split} {len(sentences):,}" for split, sentences in text.splits.items())
        epochs = run.training.max_steps / self.stream.batches_per_epoch
        start = "random weights" if run.task.from_scratch else f"from {run.task.checkpoint}"
        return {
            "run": run_row(self.setup, start),
            "sentences": f"{text.name}  ({sizes}; {len(text.labels)} classes) {text.note}",
            "tokens": f"{text.tokenizer.label}, vocabulary {text.vocab_size:,}; {self._describe_cuts()}",
            **model_rows(self.setup),
            "batch": f"{batch_row(self.setup, 'sentences')}; {epochs:.1f} epochs",
            **schedule_rows(self.setup, f"batches of {evaluation.batch_size} sentences"),
        }

    def _describe_cuts(self) -> str:
        n_cut = sum(sentences.n_cut for sentences in self.corpus.splits.values())
        return f"{n_cut:,} sentences are longer than {self.run.model.segment_len} and lose their beginning"

    def probe(self) -> dict[str, torch.Tensor]:
        """A validation sentence for one forward pass: arguments of it, always the same on this rank."""
        sentences, world = self.corpus.splits["valid"], self.world
        indices = np.arange(world.world_size) % len(sentences)
        batch = make_batch(sentences, indices, [world.rank], starts_epoch=True)
        device = self.engine.device
        return {"input_ids_BS": batch.input_ids_BS.to(device), "padding_BS": batch.padding_BS.to(device)}

    def begin(self) -> None:
        """Start from the language model's weights, or from random ones as a control."""
        task = self.run.task
        if not task.from_scratch:
            reader = CheckpointReader(Path(task.checkpoint))
            transfer_weights(reader, self.engine, self.world, embedding=task.tokens == "checkpoint")

    def resume(self, reader: CheckpointReader) -> None:
        """Go on where a checkpoint was saved; on all ranks, before `train`.

        Raises:
            CheckpointError: it is of another model.
        """
        super().resume(reader)
        # The run folder that it names may have gone on since.
        started_from = reader.config.task.checkpoint
        self.run = replace(self.run, task=replace(self.run.task, checkpoint=started_from))

    @staticmethod
    def require_resumable(reader: CheckpointReader, run: RunConfig, corpus: Corpus | SentenceSet) -> None:
        """Refuse other sentences, which the checkpoint would not say that it saw, and another order.

        Raises:
            CheckpointError: the option that differs.
        """
        assert isinstance(corpus, SentenceSet)
        where = f"checkpoint {str(reader.folder)!r}"
        if not reader.config.task.name:
            raise CheckpointError(
                f"checkpoint.resume: {where} is a language model; give it as task.checkpoint"
            )
        for section, name in _ORDER_OF_SENTENCES:
            here, there = (getattr(getattr(config, section), name) for config in (run, reader.config))
            if here != there:
                raise CheckpointError(
                    f"{section}.{name} = {here!r}: {where} was trained with {there!r}, and what it has read"
                    " follows from that; give the same, or the run another name"
                )
        if reader.state.corpus.get("trained_on") != to_text(corpus.trained_on):
            raise CheckpointError(
                f"task.path = {run.task.path!r}: {where} was trained on other sentences; give the run another"
                " name"
            )

    def _n_tokens(self, batch: SentenceBatch) -> int:
        return batch.n_tokens

    def _forward(
        self, batch: SentenceBatch, top_k: int
    ) -> Iterator[tuple[torch.Tensor, tuple[Routing, ...]]]:
        engine, n = self.engine, self.engine.micro_batches
        memory_padding = self._memory_padding(batch)
        for index, tensors in enumerate(
            zip(*(engine.on_device(values).chunk(n) for values in batch[:3]), strict=True)
        ):
            self._beat("forward")
            output = engine.forward(
                *tensors, self.memories[index], None if memory_padding is None else memory_padding[index],
                top_k=top_k, step=self.step, rows=engine.micro_batch_rows(index),
            )  # fmt: skip
            self.memories[index] = output.memory
            yield output.loss_B.mean(), output.routings

    def _memory_padding(self, batch: SentenceBatch) -> tuple[torch.Tensor, ...] | None:
        """Where the memory of each micro-batch is padding, which follows from the batches before this one."""
        if self.memories[0] is None:
            return None
        missing = self.memories[0][0].shape[1]
        parts, step = [], self.step
        while missing > 0:
            step -= 1
            parts.append(self.stream.batch(step).padding_BS[:, -missing:])
            missing -= parts[-1].shape[1]
        padding_BM = torch.cat([batch.padding_BS[:, :0], *reversed(parts)], dim=1)
        return self.engine.on_device(padding_BM).chunk(self.engine.micro_batches)

    def _score(
        self, split: str, top_ks: Sequence[int], step: int, after_forward: Callable[[], None]
    ) -> Accuracy:
        return evaluate_sentences(
            self.engine.forward, self.corpus, split, top_ks, self.run, self.world,
            step=step, after_batch=after_forward,
        )  # fmt: skip

    def _describe_corpus(self) -> dict[str, Any]:
        return super()._describe_corpus() | {
            "metric": "error rate",
            "trained_on": to_text(self.corpus.trained_on),
        }
