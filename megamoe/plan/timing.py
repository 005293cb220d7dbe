"""How long a step takes: a model of each kind of work by what bounds it.

    products      operations / (efficiency * peak of their type), or reading experts' weights if that is more
    element-wise  bytes read and written / bandwidth
    update        bytes of gradients and states / bandwidth
    host          number of kernels * what starting one takes, if that is more than the three above
    exchange      calls * latency + max(bytes / fast link, bytes / slow link), both networks at once

The sum of all is a step: nothing here overlaps unless `overlap_comm` is set, with which reducing gradients
runs beside the backward pass. All-to-all is waited for by what computes its rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.plan.activations import Activations, without_checkpointing
from megamoe.plan.devices import Accelerator, Cluster
from megamoe.plan.flops import FP32_ROOM, Flops
from megamoe.plan.inventory import Inventory
from megamoe.plan.launches import launches
from megamoe.plan.memory import FP32_BYTES, MOMENT_BYTES
from megamoe.plan.traffic import Moved, Traffic
from megamoe.plan.workload import Workload

SCORE_ACCESSES = 19
"""Reads and writes of a score of attention: 8 forward (products, their sum, softmax), 11 backward."""
OTHER_ACCESSES = 6
"""The same of other numbers that are kept, with their gradients and what is not kept. Assumed."""
FAST_LATENCY, SLOW_LATENCY = 20e-6, 50e-6
"""Seconds of a collective before its first byte, within a node and among nodes. Assumed."""
SECONDS_PER_LAUNCH = 5e-6
"""From Python to a kernel. Assumed."""
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step, and what follows from them.

    Attributes:
        products, elementwise, update: of computing.
        host: by which starting kernels takes longer than computing.
        all_to_all, reduction, gather: of communication; `reduction` without what is hidden.
        hidden: of the reduction, beside the backward pass.
        peak_share: operations of the model, without repeated ones, over what the device could do in a step.
    """

    products: float
    elementwise: float
    update: float
    host: float
    all_to_all: float
    reduction: float
    gather: float
    hidden: float
    peak_share: float

    @property
    def compute(self) -> float:
        """Without communication."""
        return self.products + self.elementwise + self.update + self.host

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return self.all_to_all + self.reduction + self.gather

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.exposed


def step_time(
    load: Workload, counted: Flops, moved: Traffic, inventory: Inventory, cluster: Cluster,
    ds: Mapping[str, Any], efficiency: float | None,
) -> Time:  # fmt: skip
    """Of one step of `load`'s layout.

    Args:
        efficiency: share of the peak that products reach; None: the device's own.
    """
    device, layout = cluster.device, load.layout
    products = layout.accumulation * _products(load, counted, inventory, device, efficiency)
    elementwise = layout.accumulation * _elementwise_bytes(load) / device.bandwidth
    reduction = _seconds(moved.all_reduce, device) + _seconds(moved.reduce_scatter, device)
    hidden = 0.0
    if ds.get("zero_optimization", {}).get("overlap_comm", layout.zero_stage == 3):
        # Beside the backward pass, two thirds of a micro-batch; before stage 2 only that of the last one.
        passes = layout.accumulation if layout.zero_stage >= 2 else 1
        hidden = min(reduction, 2 / 3 * (products + elementwise) * passes / layout.accumulation)
    update = _update_bytes(load, inventory) / device.bandwidth
    starting = SECONDS_PER_LAUNCH * launches(load, inventory)
    times = {
        "products": products, "elementwise": elementwise, "update": update,
        "host": max(0.0, starting - products - elementwise - update),
        "all_to_all": _seconds(moved.all_to_all, device),
        "reduction": reduction - hidden, "gather": _seconds(moved.all_gather, device),
    }  # fmt: skip
    peak = device.peak[layout.dtype]
    return Time(**times, hidden=hidden, peak_share=counted.model_per_step / sum(times.values()) / peak)


def _products(
    load: Workload, counted: Flops, inventory: Inventory, device: Accelerator, efficiency: float | None
) -> float:
    """Seconds of one micro-batch; experts with few rows each are bound by their weights."""
    reached = efficiency or device.efficiency
    local = inventory.counts.experts / load.layout.ep_size * load.itemsize
    passes = 4 if load.run.training.activation_checkpointing else 3
    seconds = 0.0
    for room, work in counted.rooms.items():
        dtype = torch.float32 if room == FP32_ROOM else load.layout.dtype
        by_products = work.total / (reached * device.peak[dtype])
        by_weights = passes * local / device.bandwidth if room == "experts" else 0.0
        seconds += max(by_products, by_weights)
    return seconds


def _elementwise_bytes(load: Workload) -> float:
    """Of one micro-batch, with what is done again."""
    whole: Activations = without_checkpointing(load)
    repeated = 4 / 3 if load.run.training.activation_checkpointing else 1
    return repeated * (SCORE_ACCESSES * whole.scores + OTHER_ACCESSES * (whole.peak - whole.scores))


def _update_bytes(load: Workload, inventory: Inventory) -> float:
    """Gradients into buckets, out and flat; states and masters read and written; weights written."""
    shares, size = inventory.shares(load.layout), load.itemsize
    held = sum(share.held for share in shares)
    owned = held if load.layout.zero_stage == 0 else sum(share.partition for share in shares)
    return 6 * size * held + (2 * (MOMENT_BYTES + FP32_BYTES) + 4 * FP32_BYTES + size) * owned


def _seconds(moved: Moved, device: Accelerator) -> float:
    latency = SLOW_LATENCY if moved.slow else FAST_LATENCY
    return moved.calls * latency + max(moved.fast / device.fast, moved.slow / device.slow)
