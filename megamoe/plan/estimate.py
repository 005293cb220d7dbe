"""Everything that is foreseen of a run under one layout on one cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.parallel.ds_config import Layout
from megamoe.plan.activations import Activations, with_checkpointing, without_checkpointing
from megamoe.plan.devices import Cluster
from megamoe.plan.flops import Flops, flops
from megamoe.plan.inventory import Inventory, inventory
from megamoe.plan.memory import Memory, memory
from megamoe.plan.timing import SECONDS_PER_DAY, Time, step_time
from megamoe.plan.traffic import Traffic, traffic
from megamoe.plan.workload import Workload, experts_per_token, largest_top_k, top_ks, workload

FREE_SHARE = 0.1
"""Of a device's memory, left to its driver, to NCCL and to gaps between tensors."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of the whole model.

    Attributes:
        total: trained and frozen.
        shared: trained, outside experts.
        experts: trained, in experts.
        frozen: held still.
        active: trained ones that a token meets, at the largest k of training.
    """

    total: int
    shared: int
    experts: int
    frozen: int
    active: int


@dataclass(frozen=True)
class Estimate:
    """What is foreseen.

    Attributes:
        run, layout, cluster: of what.
        top_k: k for which memory, operations, traffic and time are: the largest that training has in force.
        parameters: of the model.
        memory: of one rank.
        unchecked, checkpointed: activations without and with activation checkpointing.
        flops, traffic, time: of one rank and one step.
        tokens_per_second: over all ranks.
        days: of the whole run, its k as scheduled; evaluation and checkpoints come on top.
        node_hours: of the same.
        notes: what the figures leave open.
    """

    run: RunConfig
    layout: Layout
    cluster: Cluster
    top_k: int
    parameters: Parameters
    memory: Memory
    unchecked: Activations
    checkpointed: Activations
    flops: Flops
    traffic: Traffic
    time: Time
    tokens_per_second: float
    days: float
    node_hours: float
    notes: tuple[str, ...]

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors may take."""
        return (1 - FREE_SHARE) * self.cluster.device.memory

    @property
    def fits(self) -> bool:
        """Whether a rank's memory does."""
        return self.memory.total <= self.usable


def estimate(
    run: RunConfig, layout: Layout, cluster: Cluster, *, ds: Mapping[str, Any] | None = None,
    efficiency: float | None = None, top_k: int | None = None, known: Inventory | None = None,
) -> Estimate:  # fmt: skip
    """Foresee `run` in `layout` on `cluster`.

    Args:
        run: its vocabulary is known.
        layout: of as many ranks as the cluster has.
        ds: DeepSpeed's config, for buckets, overlap and offload; DeepSpeed's defaults if left out.
        efficiency: share of the peak that matrix products reach; the device's own if left out.
        top_k: k that is in force; the largest of the run's schedule if left out.
        known: the model's parameters, to count them once for many layouts.

    Raises:
        ConfigError: the layout does not fit the cluster, or something of the run cannot be foreseen.
    """
    if layout.world_size != cluster.ranks:
        raise ConfigError(
            f"layout of {layout.world_size} ranks: the cluster has {cluster.ranks}; make the two equal"
        )
    if layout.dtype not in cluster.device.peak:
        raise ConfigError(f"{layout.dtype}: {cluster.device.name} has no such arithmetic; give bf16 or fp32")
    ds, known = ds or {}, known or inventory(run)
    largest = largest_top_k(run) if top_k is None else top_k
    load = workload(run, layout, on_gpu=cluster.device.kind != "cpu", top_k=largest)
    counted, moved, time = _step(load, known, cluster, ds, efficiency)
    tokens = run.training.batch_size * run.model.segment_len
    seconds = time.step * run.training.max_steps
    if top_k is None:
        seconds = _run_seconds(load, known, cluster, ds, efficiency)
    return Estimate(
        run, layout, cluster, largest, _parameters(known, load), memory(load, known, ds),
        without_checkpointing(load), with_checkpointing(load), counted, moved, time,
        tokens_per_second=tokens / time.step,
        days=seconds / SECONDS_PER_DAY,
        node_hours=seconds / 3600 * cluster.nodes,
        notes=tuple(_notes(run, largest)),
    )  # fmt: skip


def _step(
    load: Workload, known: Inventory, cluster: Cluster, ds: Mapping[str, Any], efficiency: float | None
) -> tuple[Flops, Traffic, Time]:
    counted, moved = flops(load), traffic(load, known, cluster, ds)
    return counted, moved, step_time(load, counted, moved, known, cluster, ds, efficiency)


def _run_seconds(
    load: Workload, known: Inventory, cluster: Cluster, ds: Mapping[str, Any], efficiency: float | None
) -> float:
    """Of all steps, each with the k that is in force."""
    run, mean = load.run, 0.0
    for top_k, share in top_ks(run):
        there = workload(run, load.layout, on_gpu=load.on_gpu, top_k=top_k)
        mean += share * _step(there, known, cluster, ds, efficiency)[2].step
    return mean * run.training.max_steps


def _parameters(known: Inventory, load: Workload) -> Parameters:
    counts, n_experts = known.counts, load.run.moe.n_experts
    return Parameters(
        counts.total, counts.shared, counts.experts, counts.frozen,
        counts.active(min(load.choices, n_experts), n_experts),
    )  # fmt: skip


def _notes(run: RunConfig, top_k: int) -> list[str]:
    """What a reader must know of these figures."""
    name, notes = run.moe.router.name, []
    layers = run.moe.layer_indices(run.model.n_layers)
    if layers and not experts_per_token(run.moe, top_k)[1]:
        notes.append(
            f"policy {name}: how many experts a token takes is learned; counted as all {run.moe.n_experts}"
        )
    if layers and name in UNEVEN:
        notes.append(f"policy {name}: {UNEVEN[name]}")
    if run.model.cutoffs:
        notes.append("adaptive softmax: how many tokens are of rare clusters is taken from Zipf's law")
    return notes


UNEVEN = {
    "compete": "a mean over its steps; those in which experts compete send every token to every rank",
    "similarity": "steps in which pairs of experts are checked take longer than is counted",
    "gshard": "choices beyond capacity and second ones left out at random are counted",
    "switch": "choices beyond capacity are counted",
    "stable": "its first stage is counted",
    "pkm": "of what its memory keeps for the backward pass, indices and scores are not counted",
    "thor": "one expert gets all tokens of a pass: other ranks wait, which is not counted",
}
