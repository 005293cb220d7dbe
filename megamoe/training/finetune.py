"""From a language model's checkpoint to a finished classifier."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamoe.checkpoint.load import load_tokenizer
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.config.recipes import finetune_config
from megamoe.config.schema import RunConfig
from megamoe.data.labelled import load_labelled
from megamoe.data.sentences import SentenceSet, tokenize, word_tokenizer
from megamoe.errors import CheckpointError
from megamoe.parallel.launch import Launch
from megamoe.training.classifier_trainer import ClassifierTrainer
from megamoe.training.session import conduct, with_vocabulary


def configure_finetuning(
    checkpoint: str | Path, recipe: str, file: str | Path, overrides: Iterable[str]
) -> RunConfig:
    """The run that fine-tunes the language model of `checkpoint`; see `finetune_config`.

    Args:
        checkpoint: a ``best`` or ``step-*`` folder, or a run folder, whose newest is taken.
        recipe: "transfer" or "reference".
        file: TOML or JSON; empty for none.
        overrides: ``section.option=value``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is a classifier itself.
        ConfigError: an option is unknown or refused.
    """
    reader = CheckpointReader(locate(checkpoint))
    if reader.config.task.name:
        raise CheckpointError(
            f"task.checkpoint = {str(checkpoint)!r}: is a classifier of {reader.config.task.name}; give a"
            " language model"
        )
    return finetune_config(
        reader.config, recipe, file=file, overrides=[*overrides, f"task.checkpoint={reader.folder}"]
    )


def finetune(run: RunConfig, ds: Mapping[str, Any], launch: Launch) -> None:
    """Fine-tune in the run folder, or go on with it; every process of the launch calls this.

    Args:
        run: from `configure_finetuning`.
        ds: DeepSpeed config, in which "auto" is resolved.
        launch: who this process is.

    Raises:
        MegaMoEError: as `megamoe.training.session.train` does, or the sentences do not fit.
    """
    conduct(run, ds, launch, read_sentences, ClassifierTrainer)


def read_sentences(run: RunConfig) -> tuple[RunConfig, SentenceSet]:
    """The sentences of a run's task, and the run with its vocabulary and labels.

    Raises:
        DataError: they cannot be read, or training has sentences that are to be scored.
        CheckpointError: the tokenizer of the language model cannot be read.
    """
    text = load_labelled(run.task)
    words = run.task.tokens == "words"
    tokenizer = word_tokenizer(text) if words else load_tokenizer(run.task.checkpoint)
    sentences = tokenize(text, run.task, tokenizer, run.model.segment_len)
    for split in sentences.overlaps:
        sentences.require_unseen(split, run.task.max_overlap)
    run = replace(run, task=replace(run.task, labels=text.labels))
    return with_vocabulary(run, sentences), sentences
