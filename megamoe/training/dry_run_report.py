"""A dry run for people, for programs, and as configs to start with."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megamoe.errors import ConfigError
from megamoe.models.parameter_counts import parameter_counts
from megamoe.moe.experts import Experts
from megamoe.parallel.fake_world import Division
from megamoe.parallel.placement import global_shapes
from megamoe.training.banner import banner, describe
from megamoe.training.dry_run import DryRun
from megamoe.training.run_folder import RunFolder, write_json


def show(dry: DryRun, terminal: Console, written: RunFolder | None) -> None:
    """Print the banner of the run, then its process groups, then what falls to one rank.

    Args:
        dry: the dry run.
        terminal: where to.
        written: where its configs are now, if they are anywhere.
    """
    terminal.print(banner(describe(dry.setup, dry.text)), highlight=False)
    terminal.print()
    terminal.print(_table_of_groups(dry.divisions), highlight=False)
    terminal.print()
    rows = _share(dry) | dry.notes
    if written is not None:
        rows["written"] = f"{written.config}, {written.ds_config}"
    terminal.print(banner(rows), highlight=False)


def to_json(dry: DryRun) -> dict[str, Any]:
    """All of it, groups in full, as plain values."""
    setup = dry.setup
    world, layout, rows = setup.world, setup.layout, setup.layout.rows(setup.world.rank)
    return {
        "world_size": world.world_size,
        "rank": world.rank,
        "device": world.device.type,
        "step": setup.step,
        "layout": asdict(layout) | {"dtype": str(layout.dtype).removeprefix("torch.")},
        "parameters": asdict(parameter_counts(setup.model, global_shapes(setup.model))),
        "held": {
            "experts": list(_local_experts(dry)),
            "streams": list(rows),
            "parameters": asdict(parameter_counts(setup.model)),
        },
        "groups": {division.name: division.groups for division in dry.divisions},
        "notes": dry.notes,
        "config": setup.run.to_dict(),
        "ds_config": dry.ds_config,
    }


def write_configs(dry: DryRun, folder: Path) -> RunFolder:
    """Write the configs into `folder`, under the names that they have in a run folder.

    Raises:
        ConfigError: `folder` lies in the run folder, which only a run may write, or cannot be written.
    """
    if dry.setup.folder.holds(folder):
        raise ConfigError(f"--output = {str(folder)!r}: lies in the folder of the run; name another one")
    files = RunFolder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(files.config, dry.setup.run.to_dict())
        write_json(files.ds_config, dry.ds_config)
    except OSError as error:
        raise ConfigError(f"--output = {str(folder)!r}: cannot be written ({error})") from None
    return files


def _table_of_groups(divisions: Sequence[Division]) -> Table:
    table = Table()
    table.add_column("process groups")
    table.add_column("number", justify="right")
    table.add_column("ranks in each", justify="right")
    table.add_column("ranks")
    for division in divisions:
        groups = division.groups
        table.add_row(
            division.name,
            f"{len(groups):,}",
            f"{len(groups[0]):,}",
            _shortened(list(map(_in_short, groups)), "; "),
        )
    return table


def _share(dry: DryRun) -> dict[str, str]:
    """What falls to one rank."""
    setup, experts = dry.setup, _local_experts(dry)
    world, counts = setup.world, parameter_counts(setup.model)
    held = f"{counts.trainable:,} trainable parameters, {counts.experts:,} of them in experts"
    if setup.layout.zero_stage == 3:
        held += f"; between uses it keeps 1/{world.world_size} of each"
    rows = {f"rank {world.rank}": held}
    if experts:
        rows["expert ids"] = f"{_in_short(experts)} in each mixture layer"
    return rows | {"stream ids": f"{_in_short(setup.layout.rows(world.rank))} in each batch"}


def _local_experts(dry: DryRun) -> Sequence[int]:
    """Of each mixture layer; those of all layers have the same numbers."""
    for layer in dry.setup.model.moe_layers:
        if isinstance(layer.experts, Experts):
            return layer.experts.local
    return range(0)


def _in_short(numbers: Sequence[int]) -> str:
    """Rising numbers: "7", "0-15" or "0, 16, ..., 1008"."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 1 and last - first == len(numbers) - 1:
        return f"{first}-{last}"
    return _shortened(list(map(str, numbers)), ", ")


def _shortened(parts: Sequence[str], separator: str) -> str:
    """The first two and the last of `parts`, if they are many."""
    return separator.join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])
