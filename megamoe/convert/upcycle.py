"""Dense to mixture by copying: every expert starts as the dense network, or as a shard of it.

With weights that sum to 1 over the k chosen experts the mixture computes what the dense network did:

    sum_j w_j FFN(x) = FFN(x)

Granular: each of the E copies is cut into G shards of F / G hidden units, expert e G + g being shard g
of copy e, and w_out is multiplied by G. The router has equal rows for the G shards of a copy (a virtual
group), so that the k = m G best experts are m whole copies, each shard weighing 1/G of its copy:

    sum_c p_c sum_g (1/G) (G w_out,g relu(w_in,g x + b_in,g) + b_out) = sum_c p_c FFN(x) = FFN(x)

Only `smoe` learns rows of its own; generated or frozen ones could not be made equal, or never part.

Papers: Komatsuzaki et al., "Sparse Upcycling", ICLR 2023, arXiv 2212.05055; He et al., "Upcycling Large
Language Models into Mixture of Experts", 2024, arXiv 2410.07524 (virtual groups).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megamoe.config.schema import RunConfig
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
    "Copy the feed-forward networks of a dense checkpoint to experts. The result computes the same function,"
    " and is the start of a new run: step 0, new routers, no moments, no memory."
)
EXAMPLES = """\
  convert_checkpoint.py upcycle runs/dense upcycled --n-experts 8 --top-k 2
  convert_checkpoint.py upcycle runs/dense upcycled --n-experts 8 --top-k 2 --layers 1,3 --router smoe
  convert_checkpoint.py upcycle runs/dense upcycled --n-experts 8 --granularity 4 --top-k 8 --router smoe
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="IN", help="dense checkpoint, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--n-experts", type=int, required=True, metavar="E", help="copies of each network")
    parser.add_argument(
        "--top-k", type=int, default=2, metavar="K", help="experts per token (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", default="all", help='layers to change: "all", or 0-based as 0,2 (default: %(default)s)'
    )
    parser.add_argument(
        "--router", choices=SOFTMAX_ROUTERS, default="hyper", help="routing policy (default: %(default)s)"
    )
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="shards per copy; the result has E * G experts, K counts shards (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    tensors, dense, state = open_neutral(args.input)
    config = upcycled_config(dense, args.n_experts, args.top_k, args.layers, args.router, args.granularity)
    converted = list(upcycle(tensors, config, args.granularity))
    shown = progress(total_bytes(converted), f"writing {args.output}")
    write_neutral(args.output, converted, config, new_run(state), progress=shown)
    moe = config.moe
    print(
        f"{args.output}: {moe.n_experts} experts of width {moe.d_expert}, {moe.top_k} a token; same function"
    )
    if moe.top_k == 1 and args.router != "smoe_dropout":
        print(
            "warning: --top-k 1: the one weight is always 1, so the router gets no gradient from the loss of"
            " the model; give --top-k 2 or more to train it",
            file=sys.stderr,
        )
    return 0


def upcycled_config(
    dense: RunConfig,
    n_copies: int,
    top_k: int,
    layers: str = "all",
    router: str = "hyper",
    granularity: int = 1,
) -> RunConfig:
    """The config of the upcycled run.

    Raises:
        CheckpointError: `dense` is not the config of a dense run, or its networks cannot be cut so.
        ConfigError: a setting that contradicts the others.
    """
    for option, value in (("--n-experts", n_copies), ("--granularity", granularity)):
        if value < 1:
            raise ConfigError(f"{option} = {value}: give a number above 0")
    if granularity > 1 and router != "smoe":
        raise ConfigError(
            f"--router = {router!r}: choose smoe with --granularity, or the shards of a copy would not be"
            " chosen together"
        )
    if top_k % granularity:
        raise ConfigError(
            f"--top-k = {top_k}: give a multiple of --granularity = {granularity}, to choose whole copies"
        )
    return with_experts(
        dense, layers=layers, n_experts=n_copies * granularity, top_k=top_k, router=router,
        d_expert=require_equal_parts(dense, granularity, "--granularity"),
    )  # fmt: skip


def upcycle(tensors: Iterable[LazyTensor], config: RunConfig, granularity: int = 1) -> Iterator[LazyTensor]:
    """The tensors of the upcycled model.

    Args:
        tensors: those of the dense checkpoint.
        config: what `upcycled_config` gives.
        granularity: shards per copy G.
    """
    n_copies = config.moe.n_experts // granularity

    def make(layer: int, leaf: str, dense: LazyTensor) -> torch.Tensor:
        shards = cut(leaf, dense.checked(), granularity, scale=granularity)
        return shards.repeat(n_copies, *[1] * (shards.dim() - 1))

    layers = config.moe.layer_indices(config.model.n_layers)
    yield from replace_dense(tensors, layers, config, make)
    for layer in layers:
        yield from router_tensors(config, layer, rows_each=granularity)
