"""The CPU of this machine, measured."""

import time
from collections.abc import Callable
from statistics import median

import psutil
import torch

from megamoe.parallel.device import Device
from megamoe.plan.devices import CPU, Accelerator

MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
"""Large enough for a device's best speed."""
COPIED_BYTES = 1 << 27
"""More than caches hold."""
REPEATS = 5
LOOPBACK = 1e9
"""Bytes/s among ranks of one machine over gloo, of the order that docs/preflight.md shows."""
EFFICIENCY = 0.8
"""A step takes 1.2 times its bare products and Adam in fp32 (docs/performance.md)."""


def this_cpu(n_ranks: int) -> Accelerator:
    """What each of `n_ranks` gets that share cores and memory evenly."""
    device, abilities = torch.device("cpu"), Device.detect()
    dtypes = (torch.float32, torch.bfloat16, *([torch.float16] if abilities.fp16 else []))
    return Accelerator(
        name=CPU, kind="cpu", memory=psutil.virtual_memory().total / n_ranks,
        peak={dtype: product_speed(device, dtype) / n_ranks for dtype in dtypes},
        bandwidth=_copy_speed() / n_ranks, fast=LOOPBACK, slow=LOOPBACK, efficiency=EFFICIENCY,
        abilities=abilities,
    )  # fmt: skip


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of a product of square matrices."""
    size = MATRIX_SIZE[device.type]
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)

    def multiply() -> None:
        torch.mm(matrix, matrix, out=product)

    return 2 * size**3 / median_seconds(device, multiply)


def _copy_speed() -> float:
    """Bytes/s of memory, read and written."""
    source = torch.zeros(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_seconds(source.device, lambda: target.copy_(source))


def median_seconds(device: torch.device, action: Callable[[], object]) -> float:
    """How long `action` takes, its first call left out."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])
