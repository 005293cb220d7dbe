"""Routing policies, one file each, and the registry that finds them by name."""

from megamoe.moe.routers.registry import (
    available,
    build_router,
    build_routers,
    resolve_options,
    router_class,
)

__all__ = ["available", "build_router", "build_routers", "resolve_options", "router_class"]
