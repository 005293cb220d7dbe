"""From a policy's name to its class: those of megamoe, and those that other packages bring.

A package adds a policy by an entry point in the group ``megamoe.routers`` whose name is the policy's
name and whose value points to a subclass of `megamoe.moe.routing.Router`.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from megamoe.config.load import build, nearest
from megamoe.config.schema import RouterConfig
from megamoe.errors import ConfigError
from megamoe.moe.routing import LayerSpec, Router

ENTRY_POINT_GROUP = "megamoe.routers"

BUILT_IN = {
    "dense": "megamoe.moe.routers.dense:DenseRouter",
    "hyper": "megamoe.moe.routers.hyper:HyperRouter",
    "smoe": "megamoe.moe.routers.smoe:SMoERouter",
    "smoe_dropout": "megamoe.moe.routers.smoe_dropout:SMoEDropoutRouter",
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


def build_router(
    router: RouterConfig, d_model: int, n_experts: int, layer: int, seed: int, init_std: float
) -> Router:
    """The router of mixture layer `layer`, the same on every rank.

    Raises:
        ConfigError: as `resolve_options`.
    """
    spec = LayerSpec(d_model=d_model, n_experts=n_experts, layer=layer, seed=seed, init_std=init_std)
    return router_class(router.name)(spec, resolve_options(router))


def _sources() -> dict[str, EntryPoint]:
    ours = (EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in BUILT_IN.items())
    return {point.name: point for point in (*entry_points(group=ENTRY_POINT_GROUP), *ours)}
