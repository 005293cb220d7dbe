"""The published HyperRouter and SMoE-Dropout checkpoints as neutral ones."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.checkpoint.state import EngineCounters, TrainingState
from megamoe.config.schema import RunConfig
from megamoe.convert.model_tensors import model_tensors, require_tensors_of
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.published import PublishedModel, read_published
from megamoe.convert.published_config import run_config
from megamoe.convert.published_optimizer import PublishedOptimizer, moments, read_optimizer
from megamoe.convert.symbols import read_symbols, tokenizer_of
from megamoe.convert.tensors import LazyTensor, lazy, require_disjoint, total_bytes
from megamoe.convert.torch_file import StoredTensor
from megamoe.models.reference_names import aliases, check_tied, is_router_embedding, our_names

SUMMARY = (
    "Read model.pt, and optimizer.pt if given, of the published HyperRouter and SMoE-Dropout program. Nothing"
    " in these pickles is run. Settings come from the pickled model; what it does not hold can be given."
)
EXAMPLES = """\
  convert_checkpoint.py from-reference run/model.pt converted
  convert_checkpoint.py from-reference run/model.pt converted --optimizer run/optimizer.pt \\
      --vocab symbols.json --set training.batch_size=22
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_common_arguments(parser, "pickled model, or its state dict")
    parser.add_argument("--optimizer", type=Path, metavar="FILE", help="its optimizer.pt, for Adam's moments")


def add_common_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare what reading any published model needs."""
    parser.add_argument("input", type=Path, metavar="IN", help=f"file of torch.save: {what}")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--vocab",
        type=Path,
        metavar="FILE",
        help="symbols in the order of their ids: JSON list, or one per line",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="settings of the run that the file does not hold, such as training.batch_size=22",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    return convert(
        read_published(args.input), args, read_optimizer(args.optimizer) if args.optimizer else None
    )


def open_published(path: Path) -> tuple[list[LazyTensor], RunConfig]:
    """The tensors of a published model and its config, as far as the file tells.

    Raises:
        CheckpointError: it is no such file, or its tensors are not those of a model.
        ConfigError: what it says of the model does not fit together.
    """
    published = read_published(path)
    config = run_config(published)
    return list(neutral_tensors(published, config)), config


def convert(
    published: PublishedModel, args: argparse.Namespace, optimizer: PublishedOptimizer | None = None
) -> int:
    """Write the neutral checkpoint of a published model, as the arguments ask."""
    config = run_config(published, args.set, optimizer.settings if optimizer else None)
    tensors = list(neutral_tensors(published, config, optimizer))
    require_tensors_of(config, tensors)
    require_disjoint(tensors, [published.path])
    state = _state(config, optimizer.step if optimizer else 0)
    if args.vocab:
        tokenizer = tokenizer_of(read_symbols(args.vocab), config.model.vocab_size)
        corpus = {"name": args.vocab.name, "unit": tokenizer.unit}
        state = replace(state, tokenizer=tokenizer.to_dict(), corpus=corpus)
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    write_neutral(args.output, tensors, config, state, progress=shown)
    model = config.model
    print(f"{args.output}: {model.n_layers} layers of width {model.d_model}, vocabulary {model.vocab_size:,}")
    return 0


def neutral_tensors(
    published: PublishedModel, config: RunConfig, optimizer: PublishedOptimizer | None = None
) -> Iterator[LazyTensor]:
    """The tensors of `published` under our names; moments too if there is an optimizer.

    Raises:
        CheckpointError: a tensor has no counterpart, tied ones differ, or the optimizer is of another model.
    """
    for name, source in aliases(config.model).items():
        stored, original = published.tensors.get(name), published.tensors.get(source)
        if stored and original and stored != original:
            check_tied(name, stored.load(), source, original.load())
    kinds = model_tensors(config, sum(stored.numel for stored in published.tensors.values()))
    trained = {}
    for name, ours in our_names(published.tensors, config.model).items():
        kind = kinds[ours].kind if ours in kinds else "weight"
        yield as_ours(kind, ours, published.tensors[name])
        if kind == "weight" and (published.tensors[name].requires_grad or not published.modules):
            trained[name] = ours
        elif optimizer and kind == "weight":
            shape = published.tensors[name].shape
            yield from (lazy(moment, ours, torch.zeros(shape)) for moment in MOMENTS)
    if optimizer:
        for moment, name, stored in moments(optimizer, trained):
            yield as_ours(moment, trained[name], stored)


def as_ours(kind: str, name: str, stored: StoredTensor) -> LazyTensor:
    """A published tensor as ours; only the vector that generates a router has another shape here."""
    if is_router_embedding(name):
        shape = (stored.shape[-1],) if len(stored.shape) == 2 else stored.shape
        return LazyTensor(kind, name, shape, stored.dtype, lambda: stored.load().flatten())
    return LazyTensor(kind, name, stored.shape, stored.dtype, stored.load)


def _state(config: RunConfig, step: int) -> TrainingState:
    streams = step * config.training.batch_size
    counters = EngineCounters(global_steps=step, global_samples=streams, optimizer_step=step)
    return TrainingState(step=step, tokens_seen=streams * config.model.segment_len, engine=counters)
