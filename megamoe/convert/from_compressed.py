"""Compressed checkpoint to neutral: every expert gets dense weights again."""

import argparse
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from megamoe.checkpoint.compressed import REPLACED, CompressedReader, open_reader
from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.neutral import tensors_of
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError
from megamoe.moe.mixture import Weights

SUMMARY = (
    "Restore the experts of a compressed checkpoint. The result computes the same, is as large as the model"
    " was before, and can be trained on."
)
EXAMPLES = """\
  convert_checkpoint.py from-compressed small restored
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", type=Path, metavar="IN", help="compressed checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    reader = open_reader(args.input)
    if not isinstance(reader, CompressedReader):
        raise CheckpointError(f"{str(args.input)!r}: is not compressed")
    reader.verify_files()
    tensors = list(restored(reader))
    require_tensors_of(reader.config, tensors)
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    write_neutral(args.output, tensors, reader.config, reader.state, progress=shown)
    print(f"{args.output}: restored from {reader.compression.method}, {reader.compression.keep:g} kept")
    return 0


def restored(reader: CompressedReader) -> Iterator[LazyTensor]:
    """The tensors of the neutral checkpoint; one layer's experts are in memory at a time."""

    @lru_cache(maxsize=1)
    def weights(layer: int) -> Weights:
        return reader.experts(layer).weights()

    def load(layer: int, leaf: str) -> torch.Tensor:
        values: torch.Tensor = getattr(weights(layer), leaf)
        return values

    yield from (tensor for tensor in tensors_of(reader) if tensor.kind != "compressed")
    E, F, D = reader.config.moe.n_experts, reader.config.moe.d_expert, reader.config.model.d_model
    shapes = {"w_in": (E, F, D), "b_in": (E, F), "w_out": (E, D, F)}
    for layer in reader.compression.layers:
        for leaf in REPLACED:
            name = f"layers.{layer}.moe.experts.{leaf}"
            yield LazyTensor("weight", name, shapes[leaf], "float32", partial(load, layer, leaf))
