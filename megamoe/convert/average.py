"""The mean of the weights of several checkpoints of one run."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megamoe.checkpoint.matching import require_same_options
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.convert.neutral import open_neutral, write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError
from megamoe.parallel.counters import EngineCounters

SUMMARY = (
    "Average the weights of several checkpoints, each counting the same: stochastic weight averaging as the"
    " published program does it. Step, tokenizer and settings come from the last; moments and memory belong"
    " to none of the averaged weights and are left out."
)
EXAMPLES = """\
  convert_checkpoint.py average runs/a/checkpoints/step-000300000 runs/a/checkpoints/step-000350000 \\
      runs/a/checkpoints/step-000400000 averaged
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("inputs", nargs="+", metavar="IN", help="two or more checkpoints or run folders")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    if len(args.inputs) < 2:
        raise CheckpointError(
            f"average: {args.inputs[0]} alone; give two checkpoints or more, then the output"
        )
    *_, (_, config, state) = opened = [open_neutral(path) for path in args.inputs]
    for path in args.inputs:
        require_same_options(CheckpointReader(locate(path)), config.model, config.moe)
    tensors = averaged([tensors for tensors, _, _ in opened], args.inputs)
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    engine = EngineCounters(
        global_steps=state.engine.global_steps, global_samples=state.engine.global_samples
    )
    state = replace(state, best_metric=None, best_step=None, engine=engine)
    write_neutral(args.output, tensors, config, state, progress=shown)
    print(f"{args.output}: mean of {len(args.inputs)} checkpoints")
    return 0


def averaged(checkpoints: Sequence[Sequence[LazyTensor]], paths: Sequence[str]) -> list[LazyTensor]:
    """Means of weights; buffers, which nothing trains, must be equal.

    Args:
        checkpoints: the tensors of each.
        paths: where they are, for messages.

    Raises:
        CheckpointError: a tensor is missing in one of them or has another shape; when it is loaded, a buffer
            differs.
    """
    first, *others = [_by_name(tensors) for tensors in checkpoints]
    for path, other in zip(paths[1:], others, strict=True):
        if only := first.keys() ^ other.keys():
            raise CheckpointError(f"{min(only)}: is in {paths[0]} or {path} only; they are of two models")
        for name, tensor in first.items():
            if other[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{name}: {list(tensor.shape)} in {paths[0]}, {list(other[name].shape)} in {path}"
                )
    return [
        replace(
            tensor,
            load=partial(
                _mean if tensor.kind == "weight" else _equal,
                [tensor, *(other[name] for other in others)],
                paths,
            ),
        )
        for name, tensor in first.items()
    ]


def _by_name(tensors: Iterable[LazyTensor]) -> dict[str, LazyTensor]:
    return {tensor.name: tensor for tensor in tensors if tensor.kind in ("weight", "buffer")}


def _mean(sources: Sequence[LazyTensor], paths: Sequence[str]) -> torch.Tensor:
    """The running mean of the published program: m <- m + (w - m) / (n + 1)."""
    mean = sources[0].checked()
    for n, source in enumerate(sources[1:], 1):
        mean.add_(source.checked().sub_(mean).div_(n + 1))
    return mean


def _equal(sources: Sequence[LazyTensor], paths: Sequence[str]) -> torch.Tensor:
    values = sources[0].checked()
    for path, source in zip(paths[1:], sources[1:], strict=True):
        if not torch.equal(source.checked(), values):
            raise CheckpointError(f"{source.name}: differs in {paths[0]} and {path}; they are of two runs")
    return values
