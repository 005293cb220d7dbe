"""From defaults, a preset, a file and dotted overrides to one checked `RunConfig`.

Order, later wins: dataclass defaults, preset, ``--config`` file (TOML or JSON), ``section.key=value``.
Keys of ``moe.router`` other than ``name`` belong to the policy and are collected in its ``options``.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from megamoe.config.schema import RouterConfig, RunConfig
from megamoe.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for `word`: the known word closest to it, or a list of all of them."""
    names = sorted(known)
    if not names:
        return "there are none to choose from, leave it out"
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from nested plain values, as `RunConfig.to_dict` writes them.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of the wrong kind.
    """
    return build(RunConfig, values)


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Construct dataclass `cls` from plain `values`, checking every key and converting every value."""
    if cls is RouterConfig:
        values = _collect_router_options(values)
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        name = f"{path}{key}"
        if key not in hints:
            raise ConfigError(f"{name} = {value!r}: unknown key, {nearest(key, hints)}")
        arguments[key] = _convert(hints[key], value, name)
    return cls(**arguments)


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `update` laid over it; neither is changed."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["moe.top_k=4"]`` as ``{"moe": {"top_k": "4"}}``; the schema converts the strings later."""
    result: dict[str, Any] = {}
    for override in overrides:
        dotted, separator, value = override.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        for key in reversed(dotted.split(".")):
            value = {key: value}  # type: ignore[assignment]
        result = merge(result, typing.cast("Mapping[str, Any]", value))
    return result


def read_file(path: str | Path) -> dict[str, Any]:
    """The nested values of a ``.toml`` or ``.json`` file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r}: cannot be read ({error})") from None
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r}: not valid {path.suffix[1:]} ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r}: holds no table of sections")
    return values


def load_config(*, preset: str = "", file: str | Path = "", overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a preset, a config file and overrides describe together.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown key, or a value that is refused.
    """
    from megamoe.config.presets import preset_values

    values: dict[str, Any] = {}
    for layer in (
        preset_values(preset) if preset else {},
        read_file(file) if file else {},
        parse_overrides(overrides),
    ):
        update = _with_router_options(layer)
        values = merge(_without_options_of_another_router(values, update), update)
    return from_dict(values)


def named(config: RunConfig, preset: str = "") -> RunConfig:
    """`config` with the name that a run gets where none is given: PRESET-ROUTER."""
    return config if config.name else replace(config, name=f"{preset or 'run'}-{config.moe.router.name}")


def _router_section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    moe = values.get("moe")
    router = moe.get("router") if isinstance(moe, Mapping) else None
    return router if isinstance(router, Mapping) else {}


def _with_router_options(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with both spellings of a router option, in ``router`` and in ``router.options``, made one."""
    router = _router_section(values)
    if not router:
        return values
    return {**values, "moe": {**values["moe"], "router": _collect_router_options(router)}}


def _without_options_of_another_router(
    values: Mapping[str, Any], update: Mapping[str, Any]
) -> Mapping[str, Any]:
    """`values` less the router's options where `update` picks another policy, which has its own."""
    router = _router_section(values)
    name = router.get("name", RouterConfig.name)
    if not router or _router_section(update).get("name", name) == name:
        return values
    return {**values, "moe": {key: value for key, value in values["moe"].items() if key != "router"}}


def _collect_router_options(values: Mapping[str, Any]) -> dict[str, Any]:
    own = {"name", "options"}
    given = values.get("options") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"moe.router.options = {given!r}: is no option, set one of them as moe.router.NAME")
    options = dict(given)
    options.update({key: value for key, value in values.items() if key not in own})
    return {"options": options} | ({"name": values["name"]} if "name" in values else {})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as type `hint`; strings come from the command line, other types from files."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} = {value!r}: is a section, set one of its keys")
        return build(typing.cast("type[Any]", hint), value, f"{name}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{name} = {value!r}: {nearest(str(value), map(str, args))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, name)
    if origin is tuple:
        return _convert_tuple(args, value, name)
    if isinstance(hint, type) and hint in (bool, int, float, str):
        return _convert_scalar(hint, value, name)
    return value


def _convert_union(args: tuple[Any, ...], value: Any, name: str) -> Any:
    for arg in args:
        try:
            return _convert(arg, value, name)
        except ConfigError:
            continue
    kinds = " or ".join(
        getattr(arg, "__name__", "") if isinstance(arg, type) else str(typing.get_args(arg)[0])
        for arg in args
    )
    raise ConfigError(f"{name} = {value!r}: expected {kinds}")


def _convert_tuple(args: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    items = value
    if isinstance(value, str):
        items = [item for item in value.strip("[]()").replace(" ", "").split(",") if item]
    if not isinstance(items, list | tuple):
        raise ConfigError(f"{name} = {value!r}: expected a list such as 1,2,4")
    if args[-1] is not Ellipsis and len(items) != len(args):
        raise ConfigError(f"{name} = {value!r}: expected {len(args)} numbers")
    return tuple(_convert(args[0], item, name) for item in items)


def _convert_scalar(hint: type, value: Any, name: str) -> Any:
    words = {"true": True, "false": False}
    if hint is bool:
        result = words.get(value.lower()) if isinstance(value, str) else value
        if isinstance(result, bool):
            return result
        raise ConfigError(f"{name} = {value!r}: expected true or false")
    if hint is str:
        if isinstance(value, str):
            return value
        raise ConfigError(f"{name} = {value!r}: expected text")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name} = {value!r}: expected a number")
    try:
        number = float(value)
        if not math.isfinite(number):
            raise ConfigError(f"{name} = {value!r}: expected a finite number")
        if hint is float:
            return number
        whole = int(value) if not isinstance(value, float) else int(number)
    except (ValueError, OverflowError):
        kind = "a whole number" if hint is int else "a number"
        raise ConfigError(f"{name} = {value!r}: expected {kind}") from None
    if whole != number:
        raise ConfigError(f"{name} = {value!r}: expected a whole number")
    return whole
