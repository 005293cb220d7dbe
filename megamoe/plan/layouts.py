"""Which layouts of a run fit a cluster, and which of them are fastest."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.moe.routers import router_class
from megamoe.parallel.ds_config import Layout, layout_of, resolve_ds_config
from megamoe.plan.devices import Cluster
from megamoe.plan.estimate import Estimate, estimate
from megamoe.plan.inventory import Inventory, inventory
from megamoe.plan.units import seconds, size
from megamoe.plan.vocabulary import with_known_vocabulary
from megamoe.plan.workload import checkpointing, largest_top_k

N_BEST = 3
STAGES = (1, 2)
MOST_NODES = 1 << 14


@dataclass(frozen=True)
class Plan:
    """A run on a cluster.

    Attributes:
        chosen: the layout that its configs describe.
        best: the fastest of those that fit, the fastest first; the chosen one may be among them.
        largest_micro_batch: streams of a micro-batch with which the chosen layout still fits; 0 if none does.
        remedy: what would make the chosen layout fit; empty if it does.
    """

    chosen: Estimate
    best: tuple[Estimate, ...]
    largest_micro_batch: int
    remedy: str


@dataclass(frozen=True)
class Search:
    """What stays the same while layouts are tried.

    Attributes:
        run: its vocabulary is known.
        ds: resolved DeepSpeed config.
        known: the model's parameters.
        efficiency: see `estimate`.
    """

    run: RunConfig
    cluster: Cluster
    ds: Mapping[str, Any]
    known: Inventory
    efficiency: float | None

    def estimate(self, layout: Layout, checkpointed: bool, top_k: int | None = None) -> Estimate:
        """Of one layout; at `top_k` alone, which is quicker, or over the schedule of the run."""
        run = checkpointing(self.run, checkpointed)
        return estimate(
            run, layout, self.cluster, ds=self.ds, efficiency=self.efficiency, top_k=top_k, known=self.known
        )


def plan(run: RunConfig, ds: Mapping[str, Any], cluster: Cluster, efficiency: float | None = None) -> Plan:
    """Foresee a run as it is configured, and look for better layouts of it.

    Args:
        run: as `megamoe train` takes it.
        ds: DeepSpeed config as it was given.
        efficiency: share of the peak that matrix products reach; the device's own if left out.

    Raises:
        ConfigError: the configs contradict each other or the cluster, or something cannot be foreseen.
    """
    if run.task.name:
        raise ConfigError(f"task.name = {run.task.name!r}: only language models are planned; leave it out")
    run = with_known_vocabulary(run)
    resolved = resolve_ds_config(run, ds, cluster.ranks, cluster.device.abilities)
    layout = layout_of(run, resolved, cluster.ranks)
    search = Search(run, cluster, resolved, inventory(run), efficiency)
    chosen = search.estimate(layout, run.training.activation_checkpointing)
    best = tuple(best_layouts(search, layout))
    remedy = "" if chosen.fits else _remedy(search, chosen, best)
    return Plan(chosen, best, largest_micro_batch(search, chosen), remedy)


def best_layouts(search: Search, like: Layout) -> list[Estimate]:
    """The fastest that fit: by time of a step, then by bytes of rows between nodes, then by memory."""
    top_k = largest_top_k(search.run)
    tried = [search.estimate(*candidate, top_k) for candidate in _candidates(search, like)]
    fitting = sorted((one for one in tried if one.fits), key=_rank)
    best = fitting[:N_BEST]
    return [search.estimate(one.layout, one.run.training.activation_checkpointing) for one in best]


def largest_micro_batch(search: Search, chosen: Estimate) -> int:
    """The largest with which the chosen layout fits, whatever the batch; 0 if one stream is too much."""

    def fits(streams: int) -> bool:
        layout = replace(chosen.layout, micro_batch_size=streams)
        checkpointed = chosen.run.training.activation_checkpointing
        return search.estimate(layout, checkpointed, chosen.top_k).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require_fit(made: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        ConfigError: by how much a rank is short, and what would make it fit.
    """
    chosen = made.chosen
    if chosen.fits:
        return
    short = chosen.memory.total - chosen.usable
    raise ConfigError(
        f"memory: a rank needs {size(chosen.memory.total)}, {size(short)} more than tensors may take of"
        f" {chosen.cluster.device.name}'s {size(chosen.cluster.device.memory)}; {made.remedy}"
    )


def settings(one: Estimate) -> str:
    """The options that ask for a layout."""
    stage = f" with zero_optimization.stage {one.layout.zero_stage}"
    checkpointed = str(one.run.training.activation_checkpointing).lower()
    return (
        f"moe.ep_size={one.layout.ep_size} training.micro_batch_size={one.layout.micro_batch_size}"
        f" training.activation_checkpointing={checkpointed}{stage}"
    )


def why(one: Estimate) -> str:
    """What speaks for a layout, in numbers."""
    time, moved, memory = one.time, one.traffic, one.memory
    parts = [f"{seconds(time.step)} a step, {time.exposed / time.step:.0%} of it communication"]
    if one.layout.ep_size > 1:
        between = moved.all_to_all.slow
        rows = "none of it between nodes" if between == 0 else f"{size(between)} between nodes"
        parts.append(f"all-to-all {size(moved.all_to_all.total)}, {rows}")
    elif one.parameters.experts:
        parts.append("all experts on every rank, so no all-to-all")
    room = one.usable - memory.total
    if one.run.training.activation_checkpointing:
        without = memory.total + one.unchecked.peak - one.checkpointed.peak
        needed = "fits" if without <= one.usable else "does not fit"
        parts.append(f"without checkpointing it would be {size(without)}, which {needed}")
    else:
        parts.append("nothing is computed twice")
    parts.append(f"{size(room)} left")
    return "; ".join(parts)


def _rank(one: Estimate) -> tuple[float, ...]:
    return one.time.step, one.traffic.all_to_all.slow, one.memory.total


def _candidates(search: Search, like: Layout) -> Iterator[tuple[Layout, bool]]:
    run, per_rank = search.run, search.run.training.batch_size // like.world_size
    for ep_size in _divisors(_spreads_over(run, like.world_size)):
        for micro_batch in _divisors(per_rank):
            for stage in STAGES:
                layout = replace(
                    like, ep_size=ep_size, micro_batch_size=micro_batch, accumulation=per_rank // micro_batch,
                    zero_stage=stage,
                )  # fmt: skip
                yield layout, False
                yield layout, True


def _spreads_over(run: RunConfig, world_size: int) -> int:
    """The most ranks that could share a set of experts."""
    layers = run.moe.layer_indices(run.model.n_layers)
    if not layers or router_class(run.moe.router.name).owns_feed_forward:
        return 1
    return math.gcd(run.moe.n_experts, world_size)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _remedy(search: Search, chosen: Estimate, best: tuple[Estimate, ...]) -> str:
    """What would make it fit: another layout of the same nodes, or more of them."""
    if best:
        return f"{settings(best[0])} needs {size(best[0].memory.total)}"
    nodes = _enough_nodes(search, chosen.layout)
    if nodes:
        return (
            f"no layout of {search.cluster.nodes} nodes fits; --nodes {nodes} does, with as many streams each"
        )
    return "no number of nodes helps; take a device with more memory, or a shorter model.segment_len"


def _enough_nodes(search: Search, like: Layout) -> int:
    """The fewest nodes, by doubling, on which a layout with as many streams for a rank fits; 0: none."""
    run, nodes = search.run, search.cluster.nodes
    while nodes < MOST_NODES:
        nodes *= 2
        batch = run.training.batch_size * nodes // search.cluster.nodes
        grown = replace(run, training=replace(run.training, batch_size=batch))
        cluster = replace(search.cluster, nodes=nodes)
        there = replace(search, run=grown, cluster=cluster)
        if best_layouts(there, replace(like, world_size=cluster.ranks)):
            return nodes
    return 0
