"""Neutral checkpoints under the names and in the optimizer order of the published program."""

import argparse
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.format import MOMENTS
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megamoe.convert.neutral import open_neutral
from megamoe.convert.neutral_writer import new_folder
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, lazy, total_bytes
from megamoe.convert.torch_writer import write_torch_file
from megamoe.errors import CheckpointError
from megamoe.models.attention import inverse_frequencies
from megamoe.models.reference_names import (
    FREQUENCIES,
    aliases,
    is_router_embedding,
    optimizer_order,
    published_name,
)
from megamoe.moe.routers import resolve_options

PUBLISHED_ROUTERS = ("dense", "hyper", "smoe", "smoe_dropout")

SUMMARY = """\
Write model.pt, a plain state dict under the published names, and optimizer.pt, the state of Adam with
parameters in the published order. The published program pickles whole models, which takes its classes; in it:

  model.load_state_dict(torch.load("model.pt"), strict=False)  # lacks a HyperRouter's unused gate.gate.*
  optimizer.load_state_dict(torch.load("optimizer.pt"))        # made as train.py does with --freeze_gate

It gives every HyperRouter a hypernetwork of width 256; build the gate by hand for another."""
EXAMPLES = """\
  convert_checkpoint.py to-reference runs/hyper published
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", metavar="IN", help="checkpoint, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    tensors, config, state = open_neutral(args.input)
    _require_published_router(config)
    model = published_state(tensors, config.model)
    moments = [tensor for tensor in tensors if tensor.kind in MOMENTS]
    written = [tensor for tensor in tensors if tensor.kind != "memory"]
    shown = progress(total_bytes([*written, model[FREQUENCIES]]), f"writing {args.output}")
    with new_folder(args.output) as unfinished:
        write_torch_file(unfinished / "model.pt", model, progress=shown)
        if moments:
            adam = published_optimizer(moments, config.optimizer, state)
            write_torch_file(unfinished / "optimizer.pt", adam, progress=shown)
    print(f"{args.output}: model.pt{' and optimizer.pt' if moments else ', no moments for an optimizer.pt'}")
    return 0


def _require_published_router(config: RunConfig) -> None:
    """Refuse a router that the published program would take for another, or has no gate for."""
    router = config.moe.router
    if not config.moe.layer_indices(config.model.n_layers):
        return
    if router.name not in PUBLISHED_ROUTERS:
        raise CheckpointError(
            f"moe.router.name = {router.name!r}: the published program has no such gate; it has those of"
            f" {', '.join(PUBLISHED_ROUTERS)}"
        )
    if getattr(resolve_options(router), "shared", False):
        raise CheckpointError(
            "moe.router.shared = True: each published gate has its own hypernetwork; nothing to convert to"
        )


def published_state(tensors: Iterable[LazyTensor], model: ModelConfig) -> dict[str, LazyTensor]:
    """Weights and buffers by published name, in the published order; tied ones are listed twice.

    Raises:
        CheckpointError: a tensor has no counterpart there.
    """
    state = {
        published_name(tensor.name): _as_published(tensor)
        for tensor in tensors
        if tensor.kind in ("weight", "buffer")
    }
    state |= {alias: state[source] for alias, source in aliases(model).items()}
    ordered = {name: state[name] for name in optimizer_order(state)}
    return ordered | {FREQUENCIES: lazy("buffer", FREQUENCIES, inverse_frequencies(model.d_model))}


def published_optimizer(
    moments: Collection[LazyTensor], options: OptimizerConfig, state: TrainingState
) -> dict[str, Any]:
    """The state dict of `torch.optim.Adam` over the trained parameters, in the published order."""
    found = {(tensor.kind, published_name(tensor.name)): _as_published(tensor) for tensor in moments}
    order = optimizer_order({name for _, name in found})
    step = lazy("weight", "step", torch.tensor(float(state.engine.optimizer_step)))
    states = {
        number: {"step": replace(step)} | {kind: found[kind, name] for kind in MOMENTS}
        for number, name in enumerate(order)
    }
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.name](
        [torch.empty(0)],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    (group,) = optimizer.state_dict()["param_groups"]
    group |= {"initial_lr": options.lr, "params": list(range(len(order)))}
    return {"state": states, "param_groups": [group]}


def _as_published(tensor: LazyTensor) -> LazyTensor:
    if not is_router_embedding(tensor.name):
        return tensor
    return replace(tensor, shape=(1, *tensor.shape), load=lambda: tensor.load()[None])
