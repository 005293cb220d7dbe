"""A profile as people read it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megamoe.training.profile.rooms import PASSES


def rooms_table(figures: Mapping[str, Any]) -> Table:
    """Time by room, from what `rooms.json` holds; below it what a step takes when nothing is recorded."""
    table = Table(
        title=f"time of a step by room, {figures['time']} of rank 0",
        caption=_caption(figures),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("room")
    for column in (*PASSES, "total"):
        table.add_column(f"{column} (ms)", justify="right")
    table.add_column("share", justify="right")
    rooms = {name: [times[in_pass] for in_pass in PASSES] for name, times in figures["rooms"].items()}
    whole = sum(map(sum, rooms.values()))
    for name, times in rooms.items():
        cells = [f"{1000 * time:.2f}" if time else "" for time in times]
        table.add_row(name.replace("_", " "), *cells, f"{1000 * sum(times):.2f}", f"{sum(times) / whole:.1%}")
    table.add_section()
    sums = [sum(column) for column in zip(*rooms.values(), strict=True)]
    table.add_row("step", *(f"{1000 * time:.2f}" for time in (*sums, whole)), "100.0%")
    return table


def _caption(figures: Mapping[str, Any]) -> str:
    steps, seconds = figures["steps"], figures["step_seconds"]
    flops, peak = figures["flops_per_step"], figures["gemm_peak_flops"]
    return (
        f"means of {steps} steps at k = {figures['top_k']}; as many before them, not recorded, took"
        f" {1000 * seconds:.2f} ms each:\n{figures['tokens_per_second']:,.0f} tokens/s over all ranks,"
        f" {flops / 1e9:.3g} GFLOPs of matrix products per step and rank,\n"
        f"MFU {figures['mfu']:.1%} of the measured GEMM peak, {peak / 1e9:.3g} GFLOP/s in {figures['dtype']}"
    )
