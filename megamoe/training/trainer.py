"""The loop: batches through the engine, and callbacks told of it."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import read_memory, restore_checkpoint
from megamoe.checkpoint.state import TrainingState
from megamoe.checkpoint.writer import CheckpointWriter, memory_slices
from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.data.read_ahead import ReadAhead
from megamoe.data.sentences import SentenceSet
from megamoe.data.stream import TokenStream
from megamoe.errors import CheckpointError, DataError, LostRankError, MegaMoEError, StoppedError
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.rooms import room
from megamoe.moe.routers import router_class
from megamoe.moe.routing import Routing
from megamoe.moe.schedules import top_k_at
from megamoe.moe.updates import update_routers
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import World
from megamoe.parallel.lost import is_lost_rank, lost_rank
from megamoe.training import signals
from megamoe.training.banner import Setup, corpus_row, describe
from megamoe.training.callbacks.callback import Callback, StepRecord
from megamoe.training.evaluation import Evaluation, best_k, evaluate, top_ks_to_score
from megamoe.training.guard import Guard
from megamoe.training.heartbeat import Heartbeat, Watch
from megamoe.training.learning_rate import Plateau, learning_rate
from megamoe.training.run_folder import RunFolder
from megamoe.training.window import Window

logger = logging.getLogger(__name__)

Memory = tuple[torch.Tensor, ...]


class Trainer:
    """Trains the model of `run` on `corpus`; every rank of `world` has one and they move in step.

    Batch, number of experts, learning rate and random numbers of a step are functions of the step, so a
    resumed run repeats the uncut one.

    Args:
        run: with name and vocabulary resolved.
        ds_config: from `resolve_ds_config`.
        world: the ranks.
        corpus: the text.
        folder: where checkpoints go.
        callbacks: in the order in which they are told. Those that communicate must be on every rank.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on.
        best_figure: lowest validation figure so far, in the corpus' metric, at `evaluation.best_k`.
        best_step: the step of it.
        last_checkpoint: newest complete checkpoint of this process.
    """

    def __init__(
        self,
        run: RunConfig,
        ds_config: Mapping[str, Any],
        world: World,
        corpus: Corpus | SentenceSet,
        folder: RunFolder,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.run, self.world, self.folder = run, world, folder
        self.corpus: Any = corpus
        self.callbacks = list(callbacks)
        self.engine = Engine(run, ds_config, world, corpus.vocab_size)
        self.stream = self._open_stream()
        self._batches = ReadAhead(self.stream, world.device)
        self.memories: list[Memory | None] = [None] * self.engine.micro_batches
        self.plateau = Plateau()
        self.step = self.tokens = 0
        self.best_figure: float | None = None
        self.best_step: int | None = None
        self.last_checkpoint: Path | None = None
        self._kept_step = 0  # the last whose state needs no saving, because it is saved or the very start
        self._writer = CheckpointWriter(world, background=run.checkpoint.async_write)
        self._guard = Guard(run, world)
        self._window = Window()
        self._heartbeat = Heartbeat()

    def _open_stream(self) -> Any:
        """The batches of this rank by step."""
        return TokenStream(
            self.corpus.tokens["train"],
            batch_size=self.run.training.batch_size,
            segment_len=self.run.model.segment_len,
            rows=self.engine.rows,
            domains=self.corpus.domains_of("train"),
        )

    def describe(self) -> dict[str, str]:
        """Names and values for the banner."""
        return describe(self.setup, corpus_row(self.corpus))

    @property
    def setup(self) -> Setup:
        """What the banner tells of, as of now."""
        engine = self.engine
        return Setup(self.run, self.world, engine.layout, engine.model, self.folder, self.step)

    def probe(self) -> dict[str, torch.Tensor]:
        """Held-out text for one forward pass: arguments of it, those of this rank, always the same."""
        probe = probe_of(self.corpus, self.run, self.world.rank, self.world.world_size)
        return {name: values.to(self.world.device) for name, values in probe.items()}

    def train(self) -> None:
        """Run from the present step to the last, then score the test split with the best weights.

        Raises:
            StoppedError: on all ranks, because one got a signal of `signals.SIGNALS`. What was done is kept.
            DivergenceError: the guard stopped the run.
            LostRankError: another rank does not answer.
        """
        watch = Watch(self._heartbeat, self.run, self.world, self.folder.heartbeats)
        watch.start()
        try:
            self._run_to_end()
        except BaseException as error:
            watch.stop(keep_sign=not isinstance(error, StoppedError))
            if is_lost_rank(error):
                error = self._lost_rank(error)
            self._keep_last_save(error)
            self._tell("on_error", error)
            raise error
        watch.stop(keep_sign=False)

    def _run_to_end(self) -> None:
        """What is watched over."""
        self._tell("on_train_start")
        self._stop_if_asked()
        while self.step < self.run.training.max_steps:
            self._advance()
            self._stop_if_asked()
        self.wait_for_save()
        self._score_test()
        self._tell("on_train_end")

    def _lost_rank(self, error: BaseException) -> LostRankError:
        heart = self._heartbeat
        return lost_rank(error, self.world.rank, f"after step {heart.step} in {heart.phase}")

    def _beat(self, phase: str) -> None:
        """Every rank is about to do `phase`."""
        self._heartbeat.beat(phase, self.step)

    def _keep_last_save(self, error: BaseException) -> None:
        """Complete what is being written if every rank has met `error`, so that none waits for another."""
        if isinstance(error, MegaMoEError):
            try:
                self.wait_for_save()
            except CheckpointError as failure:
                logger.error("%s", failure)

    def _advance(self) -> None:
        self._beat("data")
        begin = time.perf_counter()
        record = self._train_step()
        self._window.add(record, time.perf_counter() - begin)
        self._guard.check(record)
        if self.is_due(self.run.logging.every):
            self._log(record)
        if self.is_due(self.run.evaluation.every):
            self._validate()
        self._tell("on_step_end", record)
        self._announce(self._writer.poll())

    def _stop_if_asked(self) -> None:
        """Between steps: if a rank got a signal, end the run with a checkpoint of this very step."""
        asked = signals.agreed(self.world)
        if asked is None:
            return
        if self.step != self._kept_step:
            self.save([self.folder.checkpoints / step_folder(self.step)])
        self.wait_for_save()
        raise StoppedError(f"stopped on {asked.name}")

    def _stop_scoring_if_asked(self) -> None:
        """The engine may hold the best weights by now, and the last ones are in a checkpoint."""
        self._beat("test")
        asked = signals.agreed(self.world)
        if asked is not None:
            raise StoppedError(f"stopped on {asked.name} before the test split was scored")

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps (0: at the end alone) is due after this step."""
        return self.step == self.run.training.max_steps or (every > 0 and self.step % every == 0)

    def _train_step(self) -> StepRecord:
        """One optimizer step: forward and backward passes of all micro-batches, then the update."""
        run, engine = self.run, self.engine
        top_k = top_k_at(run.moe.schedule, run.moe.top_k, self.step, run.training.max_steps)
        lr = learning_rate(run.optimizer, self.step, run.training.max_steps, self.plateau)
        engine.set_learning_rate(lr)
        with room("data"):
            batch = self._batches.batch(self.step)
        if batch.starts_epoch:
            self.memories = [None] * engine.micro_batches
        losses, auxiliaries, micro_batches = [], [], []
        for loss, routings in self._forward(batch, top_k):
            micro_batches.append(routings)
            with room("loss"):
                weighted, auxiliary = auxiliary_loss(routings, run.moe, self.world.mean)
            self._beat("backward")
            engine.backward(loss + weighted)
            losses.append(loss.detach())
            auxiliaries.append(auxiliary)
        self._beat("update")
        self._writer.wait_for_copy()
        result = engine.step()
        if not result.skipped:
            routers = [layer.router for layer in engine.model.moe_layers]
            with room("routing"):
                update_routers(routers, micro_batches, self.world, self.step)
        self.step += 1
        n_tokens = self._n_tokens(batch)
        self.tokens += n_tokens
        return StepRecord(
            step=self.step, lr=lr, top_k=self._experts_per_token(top_k), loss=torch.stack(losses).mean(),
            auxiliary=_mean_by_name(auxiliaries), grad_norm=result.grad_norm, skipped=result.skipped,
            tokens=n_tokens, routings=micro_batches[-1],
        )  # fmt: skip

    def _experts_per_token(self, top_k: int) -> int:
        moe = self.run.moe
        return router_class(moe.router.name).experts_per_token(top_k, moe.n_experts)

    def _n_tokens(self, batch: Any) -> int:
        """Tokens of a batch over all ranks."""
        n_tokens: int = self.run.training.batch_size * batch.input_ids_BS.shape[1]
        return n_tokens

    def _forward(self, batch: Any, top_k: int) -> Iterator[tuple[torch.Tensor, tuple[Routing, ...]]]:
        """Mean loss and routings of each micro-batch; the next is read when the gradients of one are done."""
        engine = self.engine
        n_parts, domains_B2 = engine.micro_batches, batch.domains_B2
        micro_batches = zip(
            engine.on_device(batch.input_ids_BS).chunk(n_parts),
            engine.on_device(batch.targets_BS).chunk(n_parts),
            [None] * n_parts if domains_B2 is None else engine.on_device(domains_B2).chunk(n_parts),
            strict=True,
        )
        for index, (input_ids_BS, targets_BS, domains_B2) in enumerate(micro_batches):
            self._beat("forward")
            output = engine.forward(
                input_ids_BS, targets_BS, self.memories[index],
                top_k=top_k, step=self.step, rows=engine.micro_batch_rows(index), domains_B2=domains_B2,
            )  # fmt: skip
            self.memories[index] = output.memory
            yield output.loss_BS.mean(), output.routings

    def _log(self, record: StepRecord) -> None:
        self._beat("log")
        figures = self._window.figures(record, self.world, self.corpus.metric)
        steps_left = self.run.training.max_steps - self.step
        figures["time/eta_seconds"] = steps_left * figures["time/step_seconds"]
        for callback in self.callbacks:
            figures |= callback.measure(self, record)
        self._window = Window()
        self._tell("on_log", {"step": self.step, "tokens": self.tokens} | figures)

    def _validate(self) -> None:
        """Score the validation split at `moe.top_k`, at all experts and at the k that decides on the best."""
        moe, deciding = self.run.moe, best_k(self.run)
        wanted = (moe.top_k, moe.n_experts, deciding)
        evaluation = self._evaluate("valid", wanted, self.step, lambda: self._beat("validation"))
        self.plateau.observe(evaluation.nats[deciding], self.run.optimizer)
        figure = evaluation.selection(deciding)
        if math.isfinite(figure) and (self.best_figure is None or figure < self.best_figure):
            self.best_figure, self.best_step = figure, self.step
        self._tell("on_evaluation", evaluation)

    def _score_test(self) -> None:
        """Score the test split with the best weights, or with the last where no validation was finite."""
        self._beat("test")
        step = self.step
        if self.best_step is not None:
            reader = CheckpointReader(self.folder.best)
            best = restore_checkpoint(reader, self.engine, self.world, load_optimizer=False)
            # After a resume from before it, the folder knows better than this process.
            self.best_figure, self.best_step, step = best.best_metric, best.step, best.step
        evaluation = self._evaluate("test", self.run.evaluation.top_ks, step, self._stop_scoring_if_asked)
        self._tell("on_evaluation", evaluation)

    def _evaluate(
        self, split: str, wanted: Sequence[int], step: int, after_forward: Callable[[], None]
    ) -> Evaluation:
        self.engine.eval()
        try:
            return self._score(split, top_ks_to_score(self.run, wanted), step, after_forward)
        finally:
            self.engine.train()

    def _score(
        self, split: str, top_ks: Sequence[int], step: int, after_forward: Callable[[], None]
    ) -> Evaluation:
        """Figures of a split; the engine is in evaluation mode."""
        return evaluate(
            self.engine.forward, self.corpus, split, top_ks, self.run, self.world, step=step,
            max_tokens=self.run.evaluation.max_tokens if split == "valid" else 0,
            after_segment=after_forward,
        )  # fmt: skip

    def begin(self) -> None:
        """Start from step 0; on all ranks, before `train`. The engine has drawn the initial weights."""

    @staticmethod
    def require_resumable(reader: CheckpointReader, run: RunConfig, corpus: Corpus | SentenceSet) -> None:
        """Refuse a checkpoint that `run` cannot go on from, beyond what is true of every checkpoint.

        Raises:
            CheckpointError: what differs, and the remedy.
        """

    def resume(self, reader: CheckpointReader) -> None:
        """Go on where a checkpoint was saved; on all ranks, before `train`.

        A checkpoint of another run folder brings everything but its best figure, whose weights are there.

        Raises:
            CheckpointError: it is of another model or another batch size.
        """
        state = restore_checkpoint(reader, self.engine, self.world)
        memory = read_memory(reader, self.engine.rows, self.run.training.batch_size)
        if memory:
            parts = [layer.to(self.engine.device).chunk(self.engine.micro_batches) for layer in memory]
            self.memories = list(zip(*parts, strict=True))
        self.step, self.tokens = state.step, state.tokens_seen
        self.plateau = reader.schedule(Plateau)
        self.last_checkpoint = reader.folder
        self._kept_step = state.step
        if self.folder.holds(reader.folder):
            self.best_figure, self.best_step = state.best_metric, state.best_step

    def save(self, folders: Sequence[Path]) -> None:
        """Write the present state into each of `folders`, in the background if the run says so.

        Callbacks are told of each folder after the step by which it is complete.
        """
        self._beat("saving")
        memory: list[torch.Tensor] = []
        if self.memories[0] is not None:
            parts = [memory for memory in self.memories if memory is not None]
            memory = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        complete = self._writer.save(
            folders, self.engine, self._state(),
            run=self.run,
            memory=memory_slices(memory, self.engine.rows, self.run.training.batch_size),
        )  # fmt: skip
        if any(folder.parent == self.folder.checkpoints for folder in folders):
            self._kept_step = self.step
        self._announce(complete)

    def wait_for_save(self) -> None:
        """Complete the checkpoint that is still being written, if there is one; on all ranks."""
        self._beat("saving")
        self._announce(self._writer.wait())

    def _announce(self, complete: Sequence[Path]) -> None:
        for folder in complete:
            if folder.parent == self.folder.checkpoints:
                self.last_checkpoint = folder
            self._tell("on_checkpoint", folder)

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            tokens_seen=self.tokens,
            best_metric=self.best_figure,
            best_step=self.best_step,
            schedule=asdict(self.plateau),
            corpus=self._describe_corpus(),
            tokenizer=self.corpus.tokenizer.to_dict(),
        )  # fmt: skip

    def _describe_corpus(self) -> dict[str, Any]:
        return {name: getattr(self.corpus, name) for name in ("name", "unit", "metric", "is_sample")}

    def _tell(self, hook: str, *what: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *what)


def probe_of(corpus: Corpus, run: RunConfig, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """What `Trainer.probe` returns, on the host.

    Raises:
        DataError: the validation split is too short for so many ranks.
    """
    tokens = corpus.tokens["valid"]
    if len(tokens) < 2 * world_size:
        raise DataError(
            f"valid split of {corpus.name}: {len(tokens):,} tokens are too few for {world_size} ranks; start"
            f" {len(tokens) // 2} or fewer, or prepare a longer one"
        )
    stream = TokenStream(
        tokens,
        batch_size=world_size,
        segment_len=run.evaluation.segment_len,
        rows=range(rank, rank + 1),
        domains=corpus.domains_of("valid"),
    )
    batch = stream.batch(0)
    given = {"input_ids_BS": batch.input_ids_BS, "domains_B2": batch.domains_B2}
    return {name: values for name, values in given.items() if values is not None}


def _mean_by_name(values: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}
