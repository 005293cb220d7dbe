"""Bytes of one rank: weights, gradients, optimizer states, activations, buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamoe.config.schema import RunConfig
from megamoe.parallel.ds_config import CPU_BUCKET, Layout, offloads_optimizer
from megamoe.plan.activations import activations
from megamoe.plan.exchange import balanced_exchange, worst_exchange
from megamoe.plan.inventory import Inventory, Share
from megamoe.plan.workload import Workload

FP32_BYTES = 4
MOMENT_BYTES = 8
"""Adam's two."""
GPU_BUCKET = 500_000_000
"""DeepSpeed's default."""
PREFETCHED = 50_000_000
"""Numbers that stage 3 gathers ahead, DeepSpeed's default."""


@dataclass(frozen=True)
class States:
    """Bytes of what lasts from step to step, and of gradients, on the rank that has most.

    Attributes:
        weights: in the type that computes; at stage 1 and 2 flattened by group, with padding.
        gradients: what is left of them when the backward pass ends; from stage 2 on those of the rank's
            partition, each whole if a part of it is in there, and twice while micro-batches accumulate.
        optimizer: moments, and from stage 1 on the masters, which fp32 runs have too. 0 if in host memory.
        frozen: in fp32.
        host: optimizer states that are kept in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    host: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer, frozen, host: see `States`.
        activations: kept for the backward pass of one micro-batch, and what is worked in beside them.
        xl_memory: of all micro-batches, and of one more while it is made.
        exchange: rows on their way to experts and at them, if routing is even.
        exchange_worst: the same if all tokens of all ranks choose experts of this one.
        buckets: DeepSpeed's, temporary: for the reduction of gradients, or for the update, whichever is more.
    """

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    activations: int
    xl_memory: int
    exchange: int
    exchange_worst: int
    buckets: int
    host: int

    @property
    def total(self) -> int:
        """The sum, which is from above: activations are gone when all gradients and buckets are there."""
        return (
            self.weights + self.gradients + self.optimizer + self.frozen + self.activations + self.xl_memory
            + self.exchange + self.buckets
        )  # fmt: skip

    @property
    def worst(self) -> int:
        """The sum with the worst exchange."""
        return self.total - self.exchange + self.exchange_worst


def memory(load: Workload, inventory: Inventory, ds: Mapping[str, Any]) -> Memory:
    """Of the rank that has most.

    Args:
        load: with the largest k.
        ds: DeepSpeed's config, for its buckets and what it offloads.
    """
    layout = load.layout
    states = states_of(inventory, layout, offloads=offloads_optimizer(ds))
    model = load.run.model
    of_layers = load.batch * model.n_layers * model.memory_len * model.d_model * layout.dtype.itemsize
    return Memory(
        states.weights, states.gradients, states.optimizer, states.frozen,
        activations=activations(load).peak,
        xl_memory=(layout.accumulation + 1) * of_layers,
        exchange=balanced_exchange(load),
        exchange_worst=worst_exchange(load),
        buckets=_buckets(load, inventory, ds),
        host=states.host,
    )  # fmt: skip


def states_of(inventory: Inventory, layout: Layout, *, offloads: bool = False) -> States:
    """Weights, gradients and optimizer states; at stage 3 a share of everything, without padding."""
    shares, size, stage = inventory.shares(layout), layout.dtype.itemsize, layout.zero_stage
    held = sum(share.held for share in shares)
    parts = sum(share.partition for share in shares)
    flattened = sum(share.padded for share in shares)
    kept = {0: held, 1: held, 3: parts}.get(stage) or _touched(shares, layout)
    per_number = MOMENT_BYTES if stage == 0 else MOMENT_BYTES + FP32_BYTES
    states = per_number * (held if stage == 0 else parts)
    return States(
        weights=size * {0: held, 3: parts}.get(stage, flattened),
        gradients=size * kept,
        optimizer=0 if offloads else states,
        frozen=FP32_BYTES * inventory.counts.frozen,
        host=states if offloads else 0,
    )


def checkpoint_bytes(run: RunConfig, inventory: Inventory, layout: Layout) -> int:
    """A checkpoint of all ranks: 12 for each trained number, 4 for each frozen one, and memories."""
    model, counts = run.model, inventory.counts
    memory = model.n_layers * run.training.batch_size * model.memory_len * model.d_model
    trained = (FP32_BYTES + MOMENT_BYTES) * counts.trainable
    return trained + FP32_BYTES * counts.frozen + memory * layout.dtype.itemsize


def bucket_size(ds: Mapping[str, Any], *, on_gpu: bool) -> int:
    """Numbers of gradients that are reduced together."""
    default = GPU_BUCKET if on_gpu else CPU_BUCKET
    return int(ds.get("zero_optimization", {}).get("reduce_bucket_size", default))


def _touched(shares: list[Share], layout: Layout) -> int:
    """Numbers of gradients that a rank keeps at stage 2, on the rank that keeps most."""
    most = max(
        sum(share.touched(rank // (layout.world_size // share.ranks)) for share in shares)
        for rank in range(layout.world_size)
    )
    return most * (2 if layout.accumulation > 1 else 1)


def _buckets(load: Workload, inventory: Inventory, ds: Mapping[str, Any]) -> int:
    """What reducing gradients takes, or updating the largest group: its gradients flat, and again in fp32."""
    layout, size = load.layout, load.layout.dtype.itemsize
    shares = inventory.shares(layout)
    largest = max(max(share.sizes) for share in shares)
    bucket = bucket_size(ds, on_gpu=load.on_gpu)
    if layout.zero_stage == 0:
        return size * min(sum(share.held for share in shares), GPU_BUCKET)
    # One bucket, two if reduction overlaps, and a flat copy of it; a larger tensor goes without.
    overlaps = bool(ds.get("zero_optimization", {}).get("overlap_comm", layout.zero_stage == 3))
    copied = max(min(bucket, sum(share.held for share in shares)), largest)
    reducing = size * (bucket * (2 if overlaps else 1) + copied)
    if layout.zero_stage == 1:
        reducing += size * sum(share.partition for share in shares)
    if layout.zero_stage == 3:
        return reducing + size * (PREFETCHED + _largest_layer(load, inventory))
    per_number = size + (FP32_BYTES if size < FP32_BYTES else 0)
    return max(reducing, per_number * max(share.partition for share in shares))


def _largest_layer(load: Workload, inventory: Inventory) -> int:
    """Numbers that stage 3 gathers at once: all experts of a layer, or the largest tensor."""
    largest = max(max(group.sizes) for group in inventory.groups)
    return max(largest, inventory.counts.experts // max(1, load.mixtures))
