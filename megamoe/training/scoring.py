"""A checkpoint scored on its own, outside training, on any number of ranks."""

from collections.abc import Iterable
from pathlib import Path

from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge, parse_overrides
from megamoe.errors import ConfigError
from megamoe.parallel.launch import Launch
from megamoe.training.evaluation import Evaluation, evaluate, top_ks_to_score
from megamoe.training.session import agree, joined, load_checked_corpus, require_same_tokens

OVERRIDABLE = ("data", "evaluation")
OF_TRAINING = ("every", "max_tokens")
"""Options of `evaluation` that say how often and how much a training run scores on the way."""


def score(
    checkpoint: str | Path, split: str, overrides: Iterable[str], launch: Launch
) -> tuple[RunConfig, Evaluation]:
    """Score a checkpoint in fp32; every process of the launch calls this and gets the same.

    Every rank holds the whole model and scores its share of the rows.

    Args:
        checkpoint: a ``best`` or ``step-*`` folder, or a run folder, whose newest is taken.
        split: "valid" or "test".
        overrides: ``data.option=value`` and ``evaluation.option=value``, over what the run had.
        launch: who this process is.

    Returns:
        The config of the run with the overrides, and its figures.

    Raises:
        MegaMoEError: there is no such checkpoint, an override does not fit, or the text is another one.
    """
    reader = CheckpointReader(locate(checkpoint))
    run = _with_overrides(reader.config, overrides)
    top_ks = top_ks_to_score(run, run.evaluation.top_ks)
    with joined(launch) as world:
        corpus = agree(world, lambda: load_checked_corpus(run))
        require_same_tokens(reader, corpus)
        model = agree(world, lambda: load_model(reader.folder)).to(world.device)
        evaluation = evaluate(model, corpus, split, top_ks, run, world, step=reader.state.step)
    return run, evaluation


def _with_overrides(run: RunConfig, overrides: Iterable[str]) -> RunConfig:
    values = parse_overrides(overrides)
    for section in values:
        if section not in OVERRIDABLE:
            raise ConfigError(f"{section}: belongs to the trained model; set data.* and evaluation.* only")
    for name in OF_TRAINING:
        if name in values.get("evaluation", {}):
            raise ConfigError(f"evaluation.{name}: belongs to training; here the whole split is scored once")
    return from_dict(merge(run.to_dict(), values))
