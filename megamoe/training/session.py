"""From a config to a finished run: everything is checked, then the run folder is made, then it trains."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from megamoe import kernels
from megamoe.checkpoint.exported import ExportReader
from megamoe.checkpoint.folder import clear_leftovers
from megamoe.checkpoint.format import step_folders
from megamoe.checkpoint.matching import require_same_options
from megamoe.checkpoint.reader import CheckpointReader, find_latest, locate
from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus, load_corpus
from megamoe.data.sentences import SentenceSet
from megamoe.data.stream import TokenStream
from megamoe.errors import CheckpointError, ConfigError, DataError, MegaMoEError, StoppedError
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.routers import resolve_options, router_class
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import DsConfig, resolve_ds_config
from megamoe.parallel.launch import GROUP_TIMEOUT, Launch, World, start
from megamoe.parallel.lost import is_lost_rank, lost_rank
from megamoe.parallel.tie import tied
from megamoe.training import signals
from megamoe.training.callbacks import build_callbacks
from megamoe.training.environment import describe_environment
from megamoe.training.evaluation import (
    best_k,
    evaluation_span,
    require_causal,
    require_known_domains,
    top_ks_to_score,
)
from megamoe.training.lock import RunLock
from megamoe.training.run_folder import RunFolder, write_json
from megamoe.training.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")
Text: TypeAlias = Corpus | SentenceSet


def train(run: RunConfig, ds: Mapping[str, Any], launch: Launch) -> None:
    """Train `run` in its run folder, or go on with it; every process of the launch calls this.

    Args:
        run: with a name.
        ds: DeepSpeed config, in which "auto" is resolved.
        launch: who this process is.

    Raises:
        DivergenceError: training was stopped by its guard.
        StoppedError: a signal stopped the run.
        LostRankError: another rank does not answer.
        MegaMoEError: something does not fit. Nothing has been written then.
    """
    conduct(run, ds, launch, read_corpus, Trainer)


def conduct(
    run: RunConfig,
    ds: Mapping[str, Any],
    launch: Launch,
    read_text: Callable[[RunConfig], tuple[RunConfig, Text]],
    trainer_class: type[Trainer],
) -> None:
    """What training and fine-tuning share; see `train`.

    Args:
        run: with a name.
        ds: DeepSpeed config, in which "auto" is resolved.
        launch: who this process is.
        read_text: the text, and the run with what follows from it; without communication.
        trainer_class: what trains.
    """
    ds_config = check_settings(run, ds, launch.world_size, Device.detect())
    folder = RunFolder.of(run)
    lock = RunLock(folder.root)
    with joined(launch, run.training.hang_timeout) as world:
        asked = signals.agreed(world)
        if asked is not None:
            raise StoppedError(f"stopped on {asked.name} before the first step")
        with tied(world, launch.address[0]):
            trainer = _set_up(run, ds_config, world, folder, lock, read_text, trainer_class)
        if trainer is not None:
            trainer.train()


def check_settings(run: RunConfig, ds: Mapping[str, Any], world_size: int, device: Device) -> DsConfig:
    """Refuse what can be refused without text, checkpoint and model.

    Returns:
        The DeepSpeed config without an "auto".

    Raises:
        ConfigError: settings contradict each other, the number of ranks or the device.
    """
    ds_config = resolve_ds_config(run, ds, world_size, device)
    resolve_options(run.moe.router)
    require_causal(run)
    top_ks_to_score(run, run.evaluation.top_ks)
    best_k(run)
    evaluation_span(run)
    return ds_config


def _set_up(
    run: RunConfig,
    ds_config: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    lock: RunLock,
    read_text: Callable[[RunConfig], tuple[RunConfig, Text]],
    trainer_class: type[Trainer],
) -> Trainer | None:
    """Everything but training, where there is something left to train; the run folder is made last."""
    run, text = agree(world, lambda: read_text(run))
    callbacks = agree(world, lambda: build_callbacks(run, folder, is_main=world.is_main))
    agree(world, lambda: lock.acquire() if world.is_main else None)
    checkpoint = _checkpoint_to_resume(run, folder, world)
    reader = agree(world, lambda: open_checkpoint(checkpoint, run, folder, text, trainer_class))
    if _is_finished(reader, run, folder, world):
        return None
    choose_kernels(run, world)
    trainer = trainer_class(run, ds_config, world, text, folder, callbacks)
    if reader is not None:
        trainer.resume(reader)
    else:
        trainer.begin()
    _rehearse(trainer)
    agree(world, lambda: _make_folder(trainer.run, ds_config, folder, lock) if world.is_main else None)
    return trainer


@contextmanager
def joined(launch: Launch, hang_timeout: float = 0.0, at_least: timedelta = GROUP_TIMEOUT) -> Iterator[World]:
    """The process group of a launch, which is left at the end and on errors that every rank meets.

    After any other error the process just ends, and its launcher ends the others: leaving the group in
    order would wait for ranks that wait for this one.

    Args:
        launch: who this process is.
        hang_timeout: seconds that a collective may take without being ended.
        at_least: what ranks may take to meet, and in a collective, if that is longer.

    Raises:
        LostRankError: another rank does not answer.
    """
    world = start(launch, max(at_least, timedelta(seconds=hang_timeout + 60)))
    try:
        yield world
    except MegaMoEError:
        world.shutdown()
        raise
    except RuntimeError as error:
        if is_lost_rank(error):
            raise lost_rank(error, world.rank, "at the start or the end") from error
        raise
    world.shutdown()


def agree(world: World, action: Callable[[], T]) -> T:
    """`action` on every rank, without communication in it; refused by one, it is refused by all.

    Raises:
        MegaMoEError: that of the first rank that raised one, on all ranks.
    """
    result, problem = None, None
    try:
        result = action()
    except MegaMoEError as error:
        problem = error
    for found in world.gather_objects(problem):
        if found is not None:
            raise found
    return result  # type: ignore[return-value]


def read_corpus(run: RunConfig) -> tuple[RunConfig, Corpus]:
    """The corpus of a language model, and the run with its vocabulary.

    Raises:
        ConfigError: the run is to train a classifier, or its vocabulary is not that of the corpus.
        DataError: the corpus cannot be read.
    """
    if run.task.name:
        raise ConfigError(
            f"task.name = {run.task.name!r}: is what megamoe finetune trains; leave it out here"
        )
    corpus = load_checked_corpus(run)
    router = run.moe.router
    if corpus.domains is None and router_class(router.name).n_domains(resolve_options(router)):
        raise ConfigError(
            f"data.domains = '': policy {router.name!r} learns matrices for each domain of the text; name a"
            " file of them, see docs/data.md"
        )
    return with_vocabulary(run, corpus), corpus


def with_vocabulary(run: RunConfig, corpus: Text) -> RunConfig:
    """`run` with `model.vocab_size` taken from the data, or checked against it.

    Raises:
        ConfigError: the vocabulary given is not that of the data, or contradicts the cut-offs.
    """
    given, found = run.model.vocab_size, corpus.vocab_size
    if given not in (0, found):
        raise ConfigError(f"model.vocab_size = {given}: {corpus.name} has {found} symbols; give 0 or {found}")
    return replace(run, model=replace(run.model, vocab_size=found))


def load_checked_corpus(run: RunConfig) -> Corpus:
    """The corpus, long enough in each split to be read as the run wants to."""
    corpus = load_corpus(run.data)
    for split, tokens in corpus.tokens.items():
        section = "training" if split == "train" else "evaluation"
        batch_size = getattr(run, section).batch_size
        try:
            TokenStream(tokens, batch_size=batch_size, segment_len=1)
        except DataError as error:
            raise DataError(f"{section}.{error} ({split} split of {corpus.name})") from None
    require_known_domains(run, corpus)
    return corpus


def require_same_tokens(reader: CheckpointReader | ExportReader, corpus: Text) -> None:
    """Refuse a checkpoint whose token ids mean something else than those of `corpus`.

    Raises:
        CheckpointError: it was trained on text that was tokenized in another way.
    """
    if reader.state.tokenizer != json.loads(json.dumps(corpus.tokenizer.to_dict())):
        raise CheckpointError(
            f"data: checkpoint {str(reader.folder)!r} was trained on {reader.state.corpus.get('name')}, whose"
            f" tokens are not those of {corpus.name}; set data.* as it had"
        )


def _checkpoint_to_resume(run: RunConfig, folder: RunFolder, world: World) -> Path | None:
    """What rank 0 finds, on all ranks: looking twice while files appear could give two answers."""

    def find() -> Path | None:
        if not world.is_main:
            return None
        if run.checkpoint.resume != "never":
            for parent in (folder.root, folder.checkpoints):
                clear_leftovers(parent)
        return find_checkpoint(run, folder)

    return world.gather_objects(agree(world, find))[0]


def find_checkpoint(run: RunConfig, folder: RunFolder) -> Path | None:
    """The checkpoint that `checkpoint.resume` means; None starts from scratch.

    A run that began with another run's checkpoint goes on from its own, so that the command that began
    it goes on with it.

    Raises:
        ConfigError: it says "never", and the run folder holds a run.
        CheckpointError: the one it names does not exist, or the run folder holds damaged ones only.
    """
    resume = run.checkpoint.resume
    started = bool(step_folders(folder.checkpoints))
    if resume == "never":
        if started:
            raise ConfigError(
                f"checkpoint.resume = 'never': {folder.root} holds a run; give another name, or remove it"
            )
        return None
    if resume != "auto" and (not started or folder.holds(Path(resume))):
        return locate(resume)
    found = find_latest(folder.root)
    if started and found is None:
        raise CheckpointError(
            f"checkpoint.resume = {resume!r}: no checkpoint in {folder.checkpoints} is complete; remove them"
            " to start over"
        )
    return found


def open_checkpoint(
    checkpoint: Path | None, run: RunConfig, folder: RunFolder, corpus: Text, trainer_class: type[Trainer]
) -> CheckpointReader | None:
    """The checkpoint from which `run` goes on; None where there is none.

    Raises:
        CheckpointError: it is of another model or text, or a run that ends before it.
    """
    if checkpoint is None:
        return None
    reader = CheckpointReader(checkpoint)
    require_same_tokens(reader, corpus)
    require_same_options(reader, run.model, run.moe)
    trainer_class.require_resumable(reader, run, corpus)
    if folder.holds(checkpoint):
        _require_same_run(reader, run, corpus)
    return reader


def _require_same_run(reader: CheckpointReader, run: RunConfig, corpus: Text) -> None:
    """Refuse to go on in a run folder with another text, at another place in it, or past the end.

    Raises:
        CheckpointError: the run was trained on another text or in other segments, or has done more steps
            than are asked for.
    """
    where, trained_on = f"checkpoint {str(reader.folder)!r}", reader.state.corpus.get("name")
    if trained_on != corpus.name:
        raise CheckpointError(
            f"data: {where} was trained on {trained_on}, not on {corpus.name}; give the run another name, and"
            " checkpoint.resume=FOLDER if it should start from those weights"
        )
    segment_len = reader.config.model.segment_len
    if run.model.segment_len != segment_len:
        raise CheckpointError(
            f"model.segment_len = {run.model.segment_len}: {where} has read segments of {segment_len}, and a"
            f" step's place in the text follows from it; give {segment_len}, or another name"
        )
    if reader.state.step > run.training.max_steps:
        raise CheckpointError(
            f"training.max_steps = {run.training.max_steps}: {where} has done {reader.state.step}; give as"
            " many or more, or another name"
        )


def _is_finished(reader: CheckpointReader | None, run: RunConfig, folder: RunFolder, world: World) -> bool:
    """Whether all steps are done and scored, by the word of rank 0, which then says so."""
    if reader is None or not has_all_steps(reader, run):
        return False
    finished = world.gather_objects(world.is_main and folder.is_scored(run.training.max_steps))[0]
    if finished and world.is_main:
        print(
            f"{folder.root}: all {run.training.max_steps:,} steps are done and scored ({folder.results});"
            " training.max_steps goes on, megamoe evaluate scores again"
        )
    return finished


def has_all_steps(reader: CheckpointReader, run: RunConfig) -> bool:
    """Whether nothing is left to train in the folder of `run`, whose newest checkpoint `reader` is."""
    return run.checkpoint.resume == "auto" and reader.state.step >= run.training.max_steps


def choose_kernels(run: RunConfig, world: World) -> None:
    """Those of the run; where they cannot be built it goes on without: a run may move to another machine."""
    try:
        kernels.use(compiled=run.training.kernels == "compiled" and world.device.type == "cpu")
    except ConfigError as error:
        logger.warning("%s; this rank goes on with torch", error)


def _rehearse(trainer: Trainer) -> None:
    """Route the probe, so that what only a forward pass can refuse is refused before anything is written."""
    engine = trainer.engine
    engine.eval()
    with torch.no_grad():
        output = engine.forward(**trainer.probe(), step=trainer.step)
        auxiliary_loss(output.routings, trainer.run.moe, trainer.world.mean)
    engine.train()


def _make_folder(run: RunConfig, ds_config: Mapping[str, Any], folder: RunFolder, lock: RunLock) -> None:
    config = run.to_dict()
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        shutil.rmtree(folder.heartbeats, ignore_errors=True)  # of a job before
        write_json(folder.config, config)
        write_json(folder.ds_config, ds_config)
        write_json(folder.environment, describe_environment(config))
    except OSError as error:
        raise ConfigError(f"output_dir = {run.output_dir!r}: cannot be written ({error})") from None
