"""Experts are left out, and the router's rows for them; the softmax shares their weight out among the others.

A generated router is first written down as plain weights, so that the result has the policy `smoe`. It is a
neutral checkpoint with fewer experts, from which training can start.

Shapes: E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from megamoe.compress.source import Source
from megamoe.compress.usage import Usage
from megamoe.config.schema import RouterConfig, RunConfig, TopKScheduleConfig
from megamoe.convert.export import generated_routers
from megamoe.convert.feed_forwards import SOFTMAX_ROUTERS
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError

_OF_EXPERTS = (
    "experts.w_in", "experts.b_in", "experts.w_out", "experts.b_out", "router.weight", "router.bias",
)  # fmt: skip


def most_useful(usage: Mapping[int, Usage], keep: float, by: str) -> dict[int, torch.Tensor]:
    """The fraction `keep` of the experts of each layer, one at least; ids rising, by layer.

    Args:
        usage: of the layers.
        keep: the fraction.
        by: one of `megamoe.compress.settings.RANKED_BY`.
    """
    kept = {}
    for layer, used in usage.items():
        worth_E = used.contribution_E if by == "contribution" else used.choices_E
        best = worth_E.argsort(descending=True, stable=True)[: max(1, round(keep * len(worth_E)))]
        kept[layer] = best.sort().values
    return kept


def require_droppable(config: RunConfig) -> None:
    """Refuse policies whose weights are no softmax over rows that could be left out.

    Raises:
        CheckpointError: naming the policy.
    """
    if config.moe.router.name not in SOFTMAX_ROUTERS:
        raise CheckpointError(
            f"moe.router.name = {config.moe.router.name!r}: has no rows of experts to leave out;"
            f" --method drop is for {', '.join(SOFTMAX_ROUTERS)}"
        )


def config_without(config: RunConfig, n_kept: int) -> RunConfig:
    """The config of the run with `n_kept` experts in each layer, and a constant k among these."""
    moe, evaluation = config.moe, config.evaluation
    router = RouterConfig(name="smoe") if moe.router.name == "hyper" else moe.router
    top_k = min(moe.top_k, n_kept)
    top_ks = tuple(k for k in evaluation.top_ks if k <= n_kept) or (top_k,)
    return replace(
        config,
        moe=replace(
            moe, n_experts=n_kept, top_k=top_k, ep_size="auto", router=router, schedule=TopKScheduleConfig()
        ),
        evaluation=replace(evaluation, top_ks=top_ks, best_k="auto"),
    )


def tensors_without(source: Source, kept: Mapping[int, torch.Tensor]) -> Iterator[LazyTensor]:
    """The tensors of the model with the kept experts alone."""
    generated = list(generated_routers(source.tensors, source.config))
    kept_of = {f"layers.{layer}.moe.{part}": ids for layer, ids in kept.items() for part in _OF_EXPERTS}
    for tensor in source.tensors:
        if tensor.name in kept_of:
            yield _rows(tensor, kept_of[tensor.name])
        elif not (generated and ".moe.router." in tensor.name):
            yield tensor
    for tensor in generated:
        yield replace(_rows(tensor, kept_of[tensor.name]), kind="weight")


def _rows(tensor: LazyTensor, kept: torch.Tensor) -> LazyTensor:
    return replace(tensor, shape=(len(kept), *tensor.shape[1:]), load=partial(_load_rows, tensor, kept))


def _load_rows(tensor: LazyTensor, kept: torch.Tensor) -> torch.Tensor:
    return tensor.checked()[kept]
