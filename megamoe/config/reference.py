"""Every option of a run as rows of text: for `megamoe config --reference` and docs/configuration.md."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union

from megamoe.config.schema import RunConfig


@dataclass(frozen=True)
class OptionRow:
    """One option: its dotted name, the values it takes, its default, and what it does."""

    name: str
    kind: str
    default: str
    help: str


def option_rows(cls: type = RunConfig, path: str = "") -> Iterator[OptionRow]:
    """The options of dataclass `cls` and of the sections in it, in the order of the source."""
    hints, defaults = typing.get_type_hints(cls), cls()
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from option_rows(typing.cast("type", hint), f"{path}{item.name}.")
        else:
            yield OptionRow(
                path + item.name, _kind(hint), _default(getattr(defaults, item.name)), item.metadata["help"]
            )


def markdown() -> str:
    """docs/configuration.md: a table for each section, options that belong to the run first."""
    sections: dict[str, list[OptionRow]] = {}
    for row in option_rows():
        sections.setdefault(row.name.rpartition(".")[0] or "run", []).append(row)
    return INTRODUCTION + "".join(_table(name, rows) for name, rows in sections.items())


INTRODUCTION = """\
# Configuration

A run is described by the options below. Later sources win: the defaults here, `--preset NAME`,
`--config FILE` (TOML or JSON, one table per section), and `section.option=value` on the command line.
An unknown option is refused and the nearest known one is named. The resolved run is printed at the
start and saved as `config.json` in the run folder; `megamoe config --preset NAME` prints it without
training. Precision, ZeRO and offload are DeepSpeed's options: see [deepspeed.md](deepspeed.md).

Options of a routing policy are written `moe.router.OPTION=VALUE`; `megamoe routers NAME` lists them.

This page is written by `megamoe config --reference`.
"""


def _table(section: str, rows: list[OptionRow]) -> str:
    lines = [f"\n## {section}\n", "| option | values | default | what it does |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", row.kind, f"`{row.default}`", row.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(arg) for arg in args)
    if origin is tuple:
        return f"list of {_kind(args[0])}"
    if origin is not None:
        return "table"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}[hint]


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or '""'
    return str(value) if value not in ("", {}) else '""'
