"""Between dense feed-forward networks and experts: what `upcycle`, `split` and `merge` share.

A network is y = w_out relu(w_in x + b_in) + b_out. Its F hidden units can be cut into parts, and the
parts' outputs without b_out add up to the network's. Shapes: D model width, F hidden width, E experts.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from megamoe.checkpoint.dtypes import dtype_name
from megamoe.checkpoint.state import TrainingState
from megamoe.config.schema import RouterConfig, RunConfig, TopKScheduleConfig
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError
from megamoe.moe.routers import build_routers
from megamoe.moe.routing import Router

SOFTMAX_ROUTERS = ("hyper", "smoe", "smoe_dropout")
"""Policies whose weights of a token are a softmax over its chosen experts, and so sum to 1."""

MakeExperts = Callable[[int, str, LazyTensor], torch.Tensor]
"""``make(layer, leaf, dense)`` is the stacked tensor of all experts, made of the dense network's."""

_DENSE = re.compile(r"layers\.(\d+)\.feed_forward\.(w_in|b_in|w_out|b_out)")


def with_experts(
    config: RunConfig, *, layers: str, n_experts: int, d_expert: int, top_k: int, router: str
) -> RunConfig:
    """The config of a dense run with experts of a new policy, a constant k and any `ep_size`.

    Raises:
        CheckpointError: the run has mixture layers already.
        ConfigError: the settings do not fit the model or each other.
    """
    if config.moe.layer_indices(config.model.n_layers):
        raise CheckpointError(
            f"moe.layers = {config.moe.layers!r}: the checkpoint has mixture layers; start from a dense one"
        )
    moe = replace(
        config.moe, layers=layers, n_experts=n_experts, d_expert=d_expert, top_k=top_k, ep_size="auto",
        router=RouterConfig(name=router), schedule=TopKScheduleConfig(),
    )  # fmt: skip
    return replace(config, moe=moe)


def new_run(state: TrainingState) -> TrainingState:
    """The state before the first step of a run that starts from converted weights."""
    return TrainingState(step=0, corpus=state.corpus, tokenizer=state.tokenizer)


def model_tensors(tensors: Iterable[LazyTensor]) -> Iterator[LazyTensor]:
    """What a model consists of: no moments, no memory."""
    return (tensor for tensor in tensors if tensor.kind in ("weight", "buffer"))


def replace_dense(
    tensors: Iterable[LazyTensor], layers: Collection[int], config: RunConfig, make: MakeExperts
) -> Iterator[LazyTensor]:
    """The model's tensors but for the dense networks of `layers`, which become experts; without routers.

    Args:
        config: of the result.
    """
    for tensor in model_tensors(tensors):
        match = _DENSE.fullmatch(tensor.name)
        if match is None or int(match[1]) not in layers:
            yield tensor
            continue
        layer, leaf = int(match[1]), match[2]
        name = f"layers.{layer}.moe.experts.{leaf}"
        shape = _stacked_shape(config, leaf)
        yield LazyTensor("weight", name, shape, tensor.dtype, partial(make, layer, leaf, tensor))


def cut(leaf: str, dense: torch.Tensor, n_parts: int, scale: float = 1.0) -> torch.Tensor:
    """Tensor `leaf` of a network as that of `n_parts` experts, each with its share of the hidden units.

    Args:
        scale: factor on the experts' outputs, that of `w_out`. Each expert gets the whole of `b_out`,
            which is right where a token's weights sum to 1.
    """
    if leaf == "w_out":
        return torch.stack(dense.chunk(n_parts, dim=1)).mul_(scale)
    if leaf == "b_out":
        return dense.expand(n_parts, -1)
    return dense.unflatten(0, (n_parts, -1))


def router_tensors(config: RunConfig, layer: int, rows_each: int = 1) -> Iterator[LazyTensor]:
    """A new router for mixture layer `layer`, as a fresh model of `config` would have it.

    Args:
        rows_each: so many experts in a row share one row of a linear router.
    """

    def build() -> Router:
        n_rows = config.moe.n_experts // rows_each
        return build_routers(config.model, config.moe, config.training.seed, n_rows)[layer]

    def values(name: str) -> torch.Tensor:
        return build().state_dict()[name].repeat_interleave(rows_each, dim=0)

    with torch.device("meta"):
        router = build()
    trained = dict(router.named_parameters())
    for name, empty in router.state_dict().items():
        kind = "weight" if name in trained else "buffer"
        shape = (empty.shape[0] * rows_each, *empty.shape[1:])
        yield LazyTensor(
            kind, f"layers.{layer}.moe.router.{name}", shape, dtype_name(empty.dtype), partial(values, name)
        )


def require_equal_parts(config: RunConfig, n_parts: int, option: str) -> int:
    """Hidden width of each of `n_parts` of the dense network.

    Raises:
        CheckpointError: the width does not divide.
    """
    if config.model.d_inner % n_parts:
        raise CheckpointError(
            f"{option} = {n_parts}: give a divisor of model.d_inner = {config.model.d_inner}"
        )
    return config.model.d_inner // n_parts


def _stacked_shape(config: RunConfig, leaf: str) -> tuple[int, ...]:
    E, F, D = config.moe.n_experts, config.moe.d_expert, config.model.d_model
    return {"w_in": (E, F, D), "b_in": (E, F), "w_out": (E, D, F), "b_out": (E, D)}[leaf]
