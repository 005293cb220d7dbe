"""A checkpoint scored on its own, outside training, on any number of ranks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megamoe.checkpoint.compressed import open_reader
from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge, parse_overrides
from megamoe.data.corpus import Corpus
from megamoe.data.labelled import load_labelled
from megamoe.data.overlap import from_text
from megamoe.data.sentences import SentenceSet, tokenize
from megamoe.errors import CheckpointError, ConfigError, DataError
from megamoe.parallel.launch import Launch
from megamoe.training.accuracy import evaluate_sentences
from megamoe.training.evaluation import Evaluation, evaluate, require_causal, top_ks_to_score
from megamoe.training.session import agree, joined, load_checked_corpus, require_same_tokens

OF_TRAINING = ("every", "max_tokens")
"""Options of `evaluation` that say how often and how much a training run scores on the way."""
OF_SENTENCES = ("path", "valid_fraction", "max_overlap")
"""Options of `task` that say which sentences are scored; the others belong to the classifier."""


def score(
    checkpoint: str | Path,
    split: str,
    overrides: Iterable[str],
    launch: Launch,
    load: Callable[[Path], Any] = load_model,
    *,
    max_tokens: int = 0,
) -> tuple[RunConfig, Evaluation]:
    """Score a checkpoint in fp32; every process of the launch calls this and gets the same.

    Every rank holds the whole model and scores its share of the rows.

    Args:
        checkpoint: a ``best`` or ``step-*`` folder, or a run folder, whose newest is taken.
        split: "valid" or "test".
        overrides: ``data.option=value`` (of a classifier, ``task.option=value``) and
            ``evaluation.option=value``, over what the run had.
        launch: who this process is.
        load: gives the model of a checkpoint's folder.
        max_tokens: of a language model, score at most about this many tokens; 0 scores all.

    Returns:
        The config of the run with the overrides, and its figures.

    Raises:
        MegaMoEError: there is no such checkpoint, an override does not fit, the text is another one, or the
            sentences were trained on.
    """
    reader = open_reader(checkpoint)
    run = with_overrides(reader.config, overrides)
    require_causal(run)
    top_ks = top_ks_to_score(run, run.evaluation.top_ks)
    with joined(launch) as world:
        text = agree(world, lambda: _read_text(run, reader, split))
        model = agree(world, lambda: load(reader.folder)).to(world.device)
        how = (split, top_ks, run, world)
        if isinstance(text, SentenceSet):
            return run, evaluate_sentences(model, text, *how, step=reader.state.step)
        return run, evaluate(model, text, *how, step=reader.state.step, max_tokens=max_tokens)


def _read_text(run: RunConfig, reader: CheckpointReader, split: str) -> Corpus | SentenceSet:
    if run.task.name:
        return _read_unseen_sentences(run, reader, split)
    corpus = load_checked_corpus(run)
    require_same_tokens(reader, corpus)
    return corpus


def _read_unseen_sentences(run: RunConfig, reader: CheckpointReader, split: str) -> SentenceSet:
    """Labelled sentences, from wherever, of which this classifier has not trained on the split."""
    try:
        trained_on = from_text(reader.state.corpus.get("trained_on"))
    except DataError as error:
        raise CheckpointError(f"checkpoint {str(reader.folder)!r}: {error}") from None
    text, tokenizer = load_labelled(run.task), load_tokenizer(reader.folder)
    sentences = tokenize(text, run.task, tokenizer, run.model.segment_len, trained_on)
    sentences.require_unseen(split, run.task.max_overlap)
    return sentences


def with_overrides(run: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The run of a checkpoint, reading another text or scored in another way; see `score`."""
    values = parse_overrides(overrides)
    text = "task" if run.task.name else "data"
    for section in values:
        if section not in (text, "evaluation"):
            raise ConfigError(f"{section}: belongs to the trained model; set {text}.* and evaluation.* only")
    for name in values.get("task", {}):
        if name not in OF_SENTENCES:
            raise ConfigError(
                f"task.{name}: belongs to the classifier; set {', '.join(f'task.{n}' for n in OF_SENTENCES)}"
            )
    for name in OF_TRAINING:
        if name in values.get("evaluation", {}):
            raise ConfigError(f"evaluation.{name}: belongs to training; here the whole split is scored once")
    return from_dict(merge(run.to_dict(), values))
