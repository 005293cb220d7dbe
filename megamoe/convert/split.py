"""Dense to mixture by cutting: the hidden units of a network are dealt out to experts, none is copied.

With the `dense` router every expert counts with weight 1, and the mixture computes what the network
did. Its b_out is then whole in expert 0 and zero in the others.

A router with softmax weights chooses k experts and weighs them 1/k on average, so w_out is multiplied
by k, and b_out is whole in every expert: a token's output is about the sum of its k experts' parts, as
in MoEfication. That is another function than the dense one.

Paper: Zhang et al., "MoEfication", Findings of ACL 2022, arXiv 2110.01786.
"""

import argparse
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from megamoe.config.schema import RunConfig
from megamoe.convert.clusters import balanced_clusters
from megamoe.convert.feed_forwards import (
    SOFTMAX_ROUTERS,
    cut,
    new_run,
    replace_dense,
    require_equal_parts,
    router_tensors,
    with_experts,
)
from megamoe.convert.neutral import open_neutral
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import ConfigError

SUMMARY = (
    "Deal the hidden units of dense feed-forward networks out to experts. With the router `dense` the result"
    " computes the same function. It is the start of a new run: step 0, no moments, no memory."
)
EXAMPLES = """\
  convert_checkpoint.py split runs/dense divided --n-experts 8
  convert_checkpoint.py split runs/dense divided --n-experts 16 --by clusters --router smoe --top-k 4
"""
BY = ("index", "clusters")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="IN", help="dense checkpoint, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--n-experts", type=int, required=True, metavar="E", help="experts; divides the hidden width"
    )
    parser.add_argument(
        "--by",
        choices=BY,
        default="index",
        help="units that go together: neighbours, or similar rows of w_in (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", default="all", help='layers to change: "all", or 0-based as 0,2 (default: %(default)s)'
    )
    parser.add_argument(
        "--router",
        choices=("dense", *SOFTMAX_ROUTERS),
        default="dense",
        help="routing policy; only dense keeps the function (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token (default: all)")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    tensors, dense, state = open_neutral(args.input)
    config = split_config(dense, args.n_experts, args.top_k, args.layers, args.router)
    converted = list(split(tensors, config, args.by))
    shown = progress(total_bytes(converted), f"writing {args.output}")
    write_neutral(args.output, converted, config, new_run(state), progress=shown)
    moe = config.moe
    kept = "same function" if args.router == "dense" else f"about the dense function at k = {moe.n_experts}"
    print(f"{args.output}: {moe.n_experts} experts of width {moe.d_expert}, {moe.top_k} a token; {kept}")
    return 0


def split_config(
    dense: RunConfig, n_experts: int, top_k: int | None = None, layers: str = "all", router: str = "dense"
) -> RunConfig:
    """The config of the divided run.

    Raises:
        CheckpointError: `dense` is not the config of a dense run, or its width does not divide.
        ConfigError: a setting that contradicts the others.
    """
    if n_experts < 1:
        raise ConfigError(f"--n-experts = {n_experts}: give a number above 0")
    if router == "dense" and top_k not in (None, n_experts):
        raise ConfigError(f"--top-k = {top_k}: leave it out, --router dense always uses all experts")
    return with_experts(
        dense, layers=layers, n_experts=n_experts, router=router,
        d_expert=require_equal_parts(dense, n_experts, "--n-experts"),
        top_k=n_experts if top_k is None else top_k,
    )  # fmt: skip


def split(tensors: Iterable[LazyTensor], config: RunConfig, by: str = "index") -> Iterator[LazyTensor]:
    """The tensors of the divided model.

    Args:
        tensors: those of the dense checkpoint.
        config: what `split_config` gives.
        by: "index", or "clusters" of w_in's rows, which puts the hidden units into another order.
    """
    tensors = list(tensors)
    n_parts, sums = config.moe.n_experts, config.moe.router.name == "dense"
    rows = {tensor.name: tensor for tensor in tensors if tensor.kind == "weight"}

    @lru_cache(maxsize=1)
    def order(layer: int) -> torch.Tensor:
        w_in_FD = rows[f"layers.{layer}.feed_forward.w_in"].checked()
        return balanced_clusters(w_in_FD, n_parts, config.training.seed).argsort(stable=True)

    def make(layer: int, leaf: str, dense: LazyTensor) -> torch.Tensor:
        values = dense.checked()
        if leaf == "b_out" and sums:
            return torch.cat([values[None], values.new_zeros(n_parts - 1, len(values))])
        if by == "clusters" and leaf != "b_out":
            values = values.index_select(values.dim() - 1 if leaf == "w_out" else 0, order(layer))
        return cut(leaf, values, n_parts, scale=1 if sums else config.moe.top_k)

    layers = config.moe.layer_indices(config.model.n_layers)
    yield from replace_dense(tensors, layers, config, make)
    for layer in layers:
        yield from router_tensors(config, layer)
