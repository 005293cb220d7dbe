"""From a checkpoint to its predictor: read text, record how it is routed, learn that, write the folder."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from megamoe.checkpoint.exported import ExportReader
from megamoe.checkpoint.folder import publish, temporary
from megamoe.checkpoint.load import load_model, open_model
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import RunConfig
from megamoe.data.corpus import Corpus
from megamoe.data.stream import TokenStream
from megamoe.errors import ConfigError, DataError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.generation import experts_to_use, require_language_model, text_span
from megamoe.serve.predictor import Predictor, PredictorShape
from megamoe.serve.predictor_file import ROUTINGS, save_predictor
from megamoe.serve.predictor_training import Fit, train_predictor
from megamoe.serve.recording import RoutingRecords, record_routings
from megamoe.training.scoring import with_overrides
from megamoe.training.session import load_checked_corpus, require_same_tokens

ROWS = 16
"""Texts that are read side by side while routings are recorded."""


def learn_predictor(
    checkpoint: str | Path,
    folder: Path,
    *,
    n_tokens: int,
    epochs: int,
    width: int,
    k: int | None = None,
    overrides: Iterable[str] = (),
    after_epoch: Callable[[int, float, float], None] = lambda epoch, loss, recall: None,
) -> Fit:
    """Train a predictor for a checkpoint and write it; it appears when it is complete.

    Args:
        checkpoint: as `load_model` takes it.
        folder: of the predictor; must not exist.
        n_tokens: how much of the training text is recorded.
        epochs: most passes over it.
        width: of the predictor.
        k: experts per token; None means `moe.top_k`.
        overrides: ``data.option=value``, over what the run had.
        after_epoch: see `train_predictor`.

    Raises:
        MegaMoEError: there is no such checkpoint, it has no experts to predict, the text is another one, or
            the folder exists.
    """
    if folder.exists():
        raise ConfigError(f"output = {str(folder)!r}: exists; choose another name, or remove it")
    reader = open_model(checkpoint)
    run, corpus = read_text_of(reader, overrides)
    top_k = experts_to_use(run, k)
    tokens = corpus.tokens["train"][:n_tokens]
    stream = TokenStream(tokens, batch_size=ROWS, segment_len=run.model.segment_len)
    if stream.n_segments < 2:
        raise DataError(f"tokens = {n_tokens}: fewer than two segments of {ROWS} rows; give more")
    model: TransformerXL = load_model(reader.folder)
    if not any(layer.experts for layer in model.moe_layers):
        raise ConfigError("moe: this model has no experts to predict; give a checkpoint of another")
    with _complete_or_absent(folder) as unfinished:
        records = record_routings(
            model, stream, unfinished / ROUTINGS, n_segments=stream.n_segments,
            top_k=top_k, step=reader.state.step, span=text_span(run),
        )  # fmt: skip
        predictor = _new_predictor(run, records, width)
        fit = train_predictor(predictor, model.embedding, records, epochs=epochs, after_epoch=after_epoch)
        save_predictor(predictor, unfinished, model, asdict(fit) | {"corpus": corpus.name})
    return fit


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to fill, with one for routings, that gets its name at the end and is removed on errors."""
    unfinished = temporary(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        try:
            (unfinished / ROUTINGS).mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                f"output = {str(folder)!r}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        yield unfinished
        publish(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _new_predictor(run: RunConfig, records: RoutingRecords, width: int) -> Predictor:
    """Untrained, from the run's seed."""
    shape = PredictorShape(
        d_model=run.model.d_model, n_layers=len(records.layers), n_experts=records.n_experts, width=width
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.training.seed)
        return Predictor(shape)


def read_text_of(
    reader: CheckpointReader | ExportReader, overrides: Iterable[str]
) -> tuple[RunConfig, Corpus]:
    """The run of a language model, and its corpus.

    Raises:
        ConfigError: it is none, or an override does not fit.
        CheckpointError: the tokens of the corpus are not those of the model.
        DataError: the corpus cannot be read.
    """
    run = with_overrides(reader.config, overrides)
    require_language_model(run)
    corpus = load_checked_corpus(run)
    require_same_tokens(reader, corpus)
    return run, corpus
