"""A plan as people read it, and as programs do."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from megamoe.plan.estimate import FREE_SHARE, Estimate
from megamoe.plan.layouts import Plan, settings, why
from megamoe.plan.scaling import Row
from megamoe.plan.traffic import Moved
from megamoe.plan.units import flop_rate, numbers, operations, seconds, size, speed

KINDS = (
    "weights", "gradients", "optimizer", "frozen", "activations", "xl_memory", "exchange", "buckets",
)  # fmt: skip
"""Of memory, as plots stack them."""


def tables(made: Plan) -> Iterator[Table]:
    """What is foreseen of the chosen layout, and the best ones."""
    one = made.chosen
    yield _facts(one)
    yield _memory(made)
    yield _work(one)
    yield _traffic(one)
    yield _time(one)
    yield _layouts("the fastest layouts that fit", made.best)


def reasons(made: Plan) -> Iterator[str]:
    """A line for each of the best layouts, and what the figures leave open."""
    for place, one in enumerate(made.best, start=1):
        yield f"{place}. {settings(one)}: {why(one)}"
    for note in made.chosen.notes:
        yield f"note: {note}"


def scaling_table(rows: Sequence[Row]) -> Table:
    """The best layout on each number of nodes."""
    table = Table(
        "scaling", "nodes", "GPUs", "batch", "ep", "micro", "acc.", "ZeRO", "again", "memory", "step",
        "tokens/s", "waits", "relative", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for row in rows:
        one, layout, time = row.one, row.one.layout, row.one.time
        table.add_row(
            row.kind, str(one.cluster.nodes), f"{one.cluster.ranks:,}", f"{one.run.training.batch_size:,}",
            str(layout.ep_size), str(layout.micro_batch_size), str(layout.accumulation),
            str(layout.zero_stage), _yes(one.run.training.activation_checkpointing),
            size(one.memory.total), seconds(time.step), numbers(one.tokens_per_second),
            f"{time.exposed / time.step:.0%}", f"{row.efficiency:.0%}",
        )  # fmt: skip
    return table


def as_json(made: Plan) -> dict[str, Any]:
    """The same as plain values: bytes, operations and seconds."""
    return {
        "chosen": estimate_json(made.chosen),
        "best": [estimate_json(one) | {"why": why(one), "settings": settings(one)} for one in made.best],
        "largest_micro_batch": made.largest_micro_batch,
    }


def estimate_json(one: Estimate) -> dict[str, Any]:
    """One layout."""
    return {
        "layout": asdict(one.layout) | {"dtype": str(one.layout.dtype).removeprefix("torch.")},
        "activation_checkpointing": one.run.training.activation_checkpointing,
        "cluster": {
            "nodes": one.cluster.nodes, "gpus_per_node": one.cluster.gpus_per_node,
            "device": one.cluster.device.name,
        },
        "top_k": one.top_k,
        "parameters": asdict(one.parameters),
        "memory": asdict(one.memory) | {"total": one.memory.total, "worst": one.memory.worst},
        "usable": one.usable,
        "fits": one.fits,
        "activations": {
            "without_checkpointing": one.unchecked.peak, "with_checkpointing": one.checkpointed.peak,
        },
        "flops": {
            "per_token_forward": one.flops.per_token_forward, "per_step": one.flops.per_step,
            "model_per_step": one.flops.model_per_step,
            "rooms": {name: work._asdict() for name, work in one.flops.rooms.items()},
        },
        "traffic": {name: moved._asdict() | {"total": moved.total} for name, moved in _moved(one)},
        "time": asdict(one.time) | {
            "compute": one.time.compute, "exposed": one.time.exposed, "step": one.time.step,
        },
        "tokens_per_second": one.tokens_per_second,
        "days": one.days,
        "node_hours": one.node_hours,
        "notes": list(one.notes),
    }  # fmt: skip


def scaling_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of `scaling_table`."""
    return [{"kind": row.kind, "efficiency": row.efficiency, **estimate_json(row.one)} for row in rows]


def _facts(one: Estimate) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    parameters, device, training = one.parameters, one.cluster.device, one.run.training
    tokens = training.batch_size * one.run.model.segment_len
    peak = flop_rate(device.peak[one.layout.dtype])
    rows = {
        "cluster": (
            f"{one.cluster.nodes} nodes x {one.cluster.gpus_per_node} {device.name}: {size(device.memory)},"
            f" {peak}, {speed(device.bandwidth)}; {speed(device.fast)} in a node, {speed(device.slow)} out"
        ),
        "parameters": (
            f"{numbers(parameters.total)}: {numbers(parameters.shared)} shared,"
            f" {numbers(parameters.experts)} in experts, {numbers(parameters.frozen)} frozen;"
            f" {numbers(parameters.active)} active at k = {one.top_k}"
        ),
        "layout": _layout(one),
        "batch": f"{training.batch_size:,} streams, {tokens:,} tokens a step; {training.max_steps:,} steps",
        "operations": (
            f"{operations(one.flops.per_token_forward)} for a token forward,"
            f" {operations(one.flops.per_step)} for a rank and step"
        ),
        "run": (
            f"{_duration(one.days)}, {one.node_hours:,.3g} node-hours for"
            f" {numbers(tokens * training.max_steps)} tokens; evaluation and checkpoints not counted"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layout(one: Estimate) -> str:
    layout = one.layout
    recompute = "with" if one.run.training.activation_checkpointing else "without"
    return (
        f"{layout.world_size:,} ranks, expert-parallel size {layout.ep_size},"
        f" micro-batch {layout.micro_batch_size} x {layout.accumulation} accumulated,"
        f" ZeRO {layout.zero_stage}, {str(layout.dtype).removeprefix('torch.')},"
        f" {recompute} activation checkpointing"
    )


def _memory(made: Plan) -> Table:
    one = made.chosen
    table = Table("memory of a rank", "", "", box=box.SIMPLE_HEAD)
    said = {
        "activations": (
            f"{size(one.unchecked.peak)} without checkpointing, {size(one.checkpointed.peak)} with it"
        ),
        "exchange": f"{size(one.memory.exchange_worst)} if all tokens choose experts of one rank",
        "buckets": "DeepSpeed's, temporary",
        "optimizer": f"{size(one.memory.host)} in host memory" if one.memory.host else "",
    }
    for kind in KINDS:
        value = getattr(one.memory, kind)
        if value or kind in said:
            table.add_row(kind.replace("xl_", "Transformer-XL "), size(value), said.get(kind, ""))
    fits = "fits" if one.fits else "does not fit"
    table.add_section()
    table.add_row(
        "total", size(one.memory.total),
        f"{fits}: {size(one.usable)} are for tensors, {FREE_SHARE:.0%} of the device is kept free",
    )  # fmt: skip
    table.add_row("largest micro-batch", str(made.largest_micro_batch), "streams, with the other settings")
    return table


def _work(one: Estimate) -> Table:
    table = Table(
        "products of a micro-batch", "forward", "backward", "repeated", "share", box=box.SIMPLE_HEAD
    )
    whole = sum(work.total for work in one.flops.rooms.values())
    for name, work in one.flops.rooms.items():
        cells = (operations(part) if part else "" for part in work)
        table.add_row(name.replace("_", " "), *cells, f"{work.total / whole:.1%}")
    return table


def _traffic(one: Estimate) -> Table:
    table = Table("sent by a rank, a step", "fast network", "slow network", "calls", box=box.SIMPLE_HEAD)
    for name, moved in _moved(one):
        if moved.total:
            table.add_row(name.replace("_", "-"), size(moved.fast), size(moved.slow), f"{moved.calls:,.0f}")
    if not table.row_count:
        table.add_row("nothing", "", "", "")
    return table


def _moved(one: Estimate) -> Iterator[tuple[str, Moved]]:
    for name in ("all_to_all", "all_reduce", "reduce_scatter", "all_gather"):
        yield name, getattr(one.traffic, name)


def _time(one: Estimate) -> Table:
    table = Table("a step", "", "share", box=box.SIMPLE_HEAD)
    time = one.time
    for name in ("products", "elementwise", "update", "host", "all_to_all", "reduction", "gather"):
        value = getattr(time, name)
        if value:
            table.add_row(name.replace("_", "-"), seconds(value), f"{value / time.step:.1%}")
    table.add_section()
    table.add_row("step", seconds(time.step), f"{time.peak_share:.1%} of the peak")
    table.add_row(
        "tokens per second", f"{one.tokens_per_second:,.0f}", f"{time.exposed / time.step:.1%} waits"
    )
    return table


def _layouts(title: str, best: Sequence[Estimate]) -> Table:
    table = Table(
        title, "ep", "micro", "acc.", "ZeRO", "again", "memory", "step", "of peak", "run",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for place, one in enumerate(best, start=1):
        layout = one.layout
        table.add_row(
            str(place), str(layout.ep_size), str(layout.micro_batch_size), str(layout.accumulation),
            str(layout.zero_stage), _yes(one.run.training.activation_checkpointing), size(one.memory.total),
            seconds(one.time.step), f"{one.time.peak_share:.1%}", _duration(one.days),
        )  # fmt: skip
    if not best:
        table.add_row("none", *[""] * 9)
    return table


def _duration(days: float) -> str:
    return f"{days:.3g} days" if days >= 1 else f"{24 * days:.3g} hours"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
