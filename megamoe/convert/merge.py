"""Mixture to dense: the experts of a layer become one feed-forward network.

concat  the hidden units of all experts side by side, E * F of them. With the `dense` router this is the
        same function, and undoes `split`: w_out is joined, b_out is the experts' sum. With softmax weights
        every expert counts as k chosen ones do on average: w_out is divided by k, b_out is the mean.
mean    the mean of the experts' weights, F hidden units: the start of a distillation, and the function
        itself where all experts are equal.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megamoe.checkpoint.dtypes import torch_dtype
from megamoe.config.schema import RunConfig
from megamoe.convert.feed_forwards import SOFTMAX_ROUTERS, model_tensors, new_run
from megamoe.convert.neutral import open_neutral
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError

SUMMARY = (
    "Make one dense feed-forward network of the experts of each layer. The result is the start of a new run:"
    " step 0, no moments, no memory."
)
EXAMPLES = """\
  convert_checkpoint.py merge divided dense-again
  convert_checkpoint.py merge runs/moe student --how mean
"""
HOW = ("concat", "mean")

_IN_MIXTURE = re.compile(r"layers\.(\d+)\.moe\.(experts|router)\.(.+)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="IN", help="checkpoint with experts, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--how",
        choices=HOW,
        default="concat",
        help="hidden units side by side, or the mean of the weights (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    tensors, mixture, state = open_neutral(args.input)
    config = merged_config(mixture, args.how)
    converted = list(merge(tensors, mixture, args.how))
    shown = progress(total_bytes(converted), f"writing {args.output}")
    write_neutral(args.output, converted, config, new_run(state), progress=shown)
    print(f"{args.output}: dense, hidden width {config.model.d_inner}")
    return 0


def merged_config(mixture: RunConfig, how: str) -> RunConfig:
    """The config of the dense run.

    Raises:
        CheckpointError: there is nothing to merge, or it cannot be merged so.
    """
    moe, model = mixture.moe, mixture.model
    layers = moe.layer_indices(model.n_layers)
    if not layers:
        raise CheckpointError(f"moe.layers = {moe.layers!r}: the checkpoint has no mixture layers to merge")
    if moe.router.name not in ("dense", *SOFTMAX_ROUTERS):
        raise CheckpointError(
            f"moe.router.name = {moe.router.name!r}: the weights it gives are not known here; merge those"
            f" of {', '.join(('dense', *SOFTMAX_ROUTERS))}"
        )
    if how == "mean" and moe.router.name == "dense":
        raise CheckpointError("--how = 'mean': router 'dense' adds experts up; use --how concat")
    width = moe.d_expert * (moe.n_experts if how == "concat" else 1)
    if len(layers) < model.n_layers and width != model.d_inner:
        raise CheckpointError(
            f"model.d_inner = {model.d_inner}: merged networks are {width} wide, but layers without experts"
            " would have to be as wide; choose another --how"
        )
    return replace(mixture, model=replace(model, d_inner=width), moe=replace(moe, layers="none"))


def merge(tensors: Iterable[LazyTensor], mixture: RunConfig, how: str) -> Iterator[LazyTensor]:
    """The tensors of the dense model.

    Args:
        tensors: those of the checkpoint with experts.
        mixture: its config.
        how: "concat" or "mean".
    """
    D, width = mixture.model.d_model, merged_config(mixture, how).model.d_inner
    shapes = {"w_in": (width, D), "b_in": (width,), "w_out": (D, width), "b_out": (D,)}
    adds_up = mixture.moe.router.name == "dense"
    for tensor in model_tensors(tensors):
        match = _IN_MIXTURE.fullmatch(tensor.name)
        if match is None:
            yield tensor
        elif match[2] == "experts":
            layer, leaf = match[1], match[3]
            if how == "mean":
                load = partial(_mean, tensor)
            else:
                load = partial(_concat, tensor, leaf, None if adds_up else mixture.moe.top_k)
            name = f"layers.{layer}.feed_forward.{leaf}"
            yield LazyTensor("weight", name, shapes[leaf], tensor.dtype, load)


def _mean(stacked: LazyTensor) -> torch.Tensor:
    """In double, so that the mean of equal experts is that expert."""
    return stacked.checked().mean(0, dtype=torch.float64).to(torch_dtype(stacked.dtype))


def _concat(stacked: LazyTensor, leaf: str, top_k: int | None) -> torch.Tensor:
    """`top_k` is None where the experts add up."""
    values = stacked.checked()
    if leaf == "b_out":
        return values.sum(0) if top_k is None else _mean(stacked)
    if leaf == "w_out":
        return values.transpose(0, 1).flatten(1).div_(top_k or 1)
    return values.flatten(0, 1)
