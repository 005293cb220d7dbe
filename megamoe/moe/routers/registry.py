"""From a policy's name to its class: those of megamoe, and those that other packages bring.

A package adds a policy by an entry point in the group ``megamoe.routers`` whose name is the policy's
name and whose value points to a subclass of `megamoe.moe.routing.Router`.
"""

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from megamoe.config.load import build, nearest
from megamoe.config.schema import ModelConfig, MoEConfig, RouterConfig
from megamoe.errors import ConfigError
from megamoe.moe.routing import LayerSpec, Router

ENTRY_POINT_GROUP = "megamoe.routers"

BUILT_IN = {
    "base": "megamoe.moe.routers.base:BASERouter",
    "bias_balanced": "megamoe.moe.routers.bias_balanced:BiasBalancedRouter",
    "clustering": "megamoe.moe.routers.clustering:ClusteringRouter",
    "compete": "megamoe.moe.routers.compete:CompeteRouter",
    "cosine": "megamoe.moe.routers.cosine:CosineRouter",
    "dense": "megamoe.moe.routers.dense:DenseRouter",
    "dts": "megamoe.moe.routers.dts:DTSRouter",
    "expert_choice": "megamoe.moe.routers.expert_choice:ExpertChoiceRouter",
    "gshard": "megamoe.moe.routers.gshard:GShardRouter",
    "hash": "megamoe.moe.routers.hash:HashRouter",
    "hyper": "megamoe.moe.routers.hyper:HyperRouter",
    "lms": "megamoe.moe.routers.lms:LMSRouter",
    "logit_dropout": "megamoe.moe.routers.logit_dropout:LogitDropoutRouter",
    "noisy": "megamoe.moe.routers.noisy:NoisyTopKRouter",
    "omni": "megamoe.moe.routers.omni:OmniRouter",
    "pkm": "megamoe.moe.routers.pkm:ProductKeyMemory",
    "random": "megamoe.moe.routers.random:RandomRouter",
    "relu": "megamoe.moe.routers.relu:ReLURouter",
    "sigma": "megamoe.moe.routers.sigma:SigmaRouter",
    "similarity": "megamoe.moe.routers.similarity:SimilarityRouter",
    "sinkhorn": "megamoe.moe.routers.sinkhorn:SinkhornRouter",
    "smoe": "megamoe.moe.routers.smoe:SMoERouter",
    "smoe_dropout": "megamoe.moe.routers.smoe_dropout:SMoEDropoutRouter",
    "stable": "megamoe.moe.routers.stable:StableRouter",
    "stratified": "megamoe.moe.routers.stratified:StratifiedRouter",
    "switch": "megamoe.moe.routers.switch:SwitchRouter",
    "thor": "megamoe.moe.routers.thor:ThorRouter",
    "topk": "megamoe.moe.routers.topk:TopKActivation",
}


def available() -> tuple[str, ...]:
    """Names of all policies that can be built here, in alphabetical order. Imports none of them."""
    return tuple(sorted(_sources()))


def router_class(name: str) -> type[Router]:
    """The class of policy `name`, imported now.

    Raises:
        ConfigError: no such policy (the nearest is named), or its package cannot be imported or
            brings something that is not a `Router`.
    """
    sources = _sources()
    if name not in sources:
        raise ConfigError(f"moe.router.name = {name!r}: unknown policy, {nearest(name, sources)}")
    source = sources[name]
    try:
        cls = source.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"moe.router.name = {name!r}: {source.value} cannot be imported ({error})"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise ConfigError(f"moe.router.name = {name!r}: {source.value} is not a megamoe Router")
    return cls


def resolve_options(router: RouterConfig) -> Any:
    """The policy's ``Options``, with its defaults filled in and every value checked and converted.

    Raises:
        ConfigError: unknown policy or option (the nearest is named), or a value that is refused.
    """
    return build(router_class(router.name).Options, router.options, "moe.router.")


def build_router(router: RouterConfig, spec: LayerSpec) -> Router:
    """The router of the mixture layer that `spec` describes, the same on every rank.

    Raises:
        ConfigError: as `resolve_options`.
    """
    return router_class(router.name)(spec, resolve_options(router))


def build_routers(
    model: ModelConfig, moe: MoEConfig, seed: int, n_experts: int | None = None
) -> dict[int, Router]:
    """The router of every mixture layer of a model by layer, from below, without the model.

    Args:
        n_experts: experts to route to; `moe.n_experts` by default.
    """
    routers: dict[int, Router] = {}
    below: Router | None = None
    for layer in moe.layer_indices(model.n_layers):
        spec = LayerSpec(
            d_model=model.d_model, n_experts=n_experts or moe.n_experts, d_expert=moe.d_expert, layer=layer,
            seed=seed, init_std=model.init_std, n_layers=model.n_layers, vocab_size=model.vocab_size,
            dropout=model.dropout, below=below,
        )  # fmt: skip
        routers[layer] = below = build_router(moe.router, spec)
    return routers


def _sources() -> dict[str, EntryPoint]:
    return _sources_on(tuple(sys.path))


@cache
def _sources_on(search_path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Searched once: every step asks, and on a slow disk a search takes longer than the step."""
    ours = (EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in BUILT_IN.items())
    return {point.name: point for point in (*entry_points(group=ENTRY_POINT_GROUP), *ours)}
