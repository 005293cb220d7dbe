"""The mean of the weights of several checkpoints of one run."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megamoe.checkpoint.matching import require_same_options
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.neutral import tensors_of
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError

SUMMARY = (
    "Average the weights of several checkpoints, each counting the same: stochastic weight averaging as the"
    " published program does it. Step, tokenizer and settings come from the last; moments and memory belong"
    " to none of the averaged weights and are left out."
)
_BLOCK = 1 << 20
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
    readers = [CheckpointReader(locate(path)) for path in args.inputs]
    last = readers[-1]
    for reader in readers:
        reader.verify_files()
        require_same_options(reader, last.config.model, last.config.moe)
        require_tensors_of(reader.config, [t for t in tensors_of(reader) if t.kind != "memory"])
        _require_same_run(reader, last)
    tensors = averaged(readers)
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    write_neutral(args.output, tensors, last.config, last.state.of_other_weights(), progress=shown)
    print(f"{args.output}: mean of {len(readers)} checkpoints")
    return 0


def _require_same_run(reader: CheckpointReader, last: CheckpointReader) -> None:
    seed, expected = reader.config.training.seed, last.config.training.seed
    if seed != expected:
        raise CheckpointError(
            f"training.seed: {seed} in {str(reader.folder)!r}, {expected} in {str(last.folder)!r}; they are"
            " of two runs"
        )
    if reader.state.tokenizer != last.state.tokenizer:
        raise CheckpointError(
            f"tokenizer: differs in {str(reader.folder)!r} and {str(last.folder)!r}; they are of two runs"
        )


def averaged(readers: Sequence[CheckpointReader]) -> list[LazyTensor]:
    """Means of weights; buffers, which nothing trains, must be equal.

    Raises:
        CheckpointError: a tensor is missing in one of them or has another shape; when it is loaded, a buffer
            differs.
    """
    first, *others = [_entries(reader) for reader in readers]
    for reader, other in zip(readers[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise CheckpointError(
                    f"{key[1]}: {_described(first.get(key))} in {str(readers[0].folder)!r},"
                    f" {_described(other.get(key))} in {str(reader.folder)!r}; they are of two models"
                )
    combine = {"weight": _mean, "buffer": _equal}
    return [
        LazyTensor(kind, name, shape, dtype, partial(combine[kind], readers, name))
        for (kind, name), (shape, dtype) in first.items()
    ]


def _entries(reader: CheckpointReader) -> dict[tuple[str, str], tuple[tuple[int, ...], str]]:
    """Shape and type of weights and buffers, by kind and name."""
    return {
        (kind, name): (entry.shape, entry.dtype)
        for kind, name, entry in reader.manifest.entries()
        if kind in ("weight", "buffer")
    }


def _described(entry: tuple[tuple[int, ...], str] | None) -> str:
    return f"{entry[1]} {list(entry[0])}" if entry else "missing"


def _mean(readers: Sequence[CheckpointReader], name: str) -> torch.Tensor:
    """The running mean of the published program: m <- m + (w - m) / (n + 1)."""
    mean = readers[0].tensor("weight", name)
    readers[0].release(mean.nbytes)
    for n, reader in enumerate(readers[1:], 1):
        for start in range(0, mean.numel(), _BLOCK):
            part = mean.view(-1)[start : start + _BLOCK]
            part += (reader.read("weight", name, start, start + len(part)) - part) / (n + 1)
            reader.release(part.nbytes)
    return mean


def _equal(readers: Sequence[CheckpointReader], name: str) -> torch.Tensor:
    values = readers[0].tensor("buffer", name)
    for reader in readers[1:]:
        if not torch.equal(reader.tensor("buffer", name), values):
            paths = f"{str(readers[0].folder)!r} and {str(reader.folder)!r}"
            raise CheckpointError(f"{name}: differs in {paths}; they are of two runs")
        reader.release(values.nbytes)
    return values
