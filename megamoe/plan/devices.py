"""What clusters are made of: accelerators by name, and their links.

Figures are those of vendors for dense products, without sparsity, and of the usual node of eight:

A100   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
       (80 GB SXM); DGX A100 datasheet: one ConnectX-6 of 200 Gb/s for each GPU
H100   NVIDIA H100 Tensor Core GPU datasheet, SXM column (its products are with sparsity: halved);
       DGX H100 datasheet: one ConnectX-7 of 400 Gb/s for each GPU
H200   NVIDIA H200 Tensor Core GPU datasheet, SXM column (halved likewise); DGX H200 datasheet
B200   NVIDIA DGX B200 datasheet, an eighth of the node: 1,440 GB, 64 TB/s, 72 PFLOP/s in FP8 with sparsity,
       which is four times bf16 without; HGX B200: 80 TFLOP/s in fp32
MI300X https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf;
       seven Infinity Fabric links of 64 GB/s each way to the seven others of a node; a network of 400 Gb/s for
       each GPU is usual, not AMD's figure

NVLink is quoted in both directions together (600, 900, 1,800 GB/s); here each way counts by itself. What torch
computes in fp32 on a GPU runs outside of tensor cores, as torch leaves TF32 off.
"""  # noqa: E501

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megamoe.config.load import nearest
from megamoe.errors import ConfigError
from megamoe.parallel.device import Device


@dataclass(frozen=True)
class Accelerator:
    """One device, on which one rank runs.

    Attributes:
        name: as `--device` takes it, in lower case.
        kind: as torch calls it; "cuda" is AMD's too.
        memory: bytes.
        peak: floating-point operations per second of dense products, by type.
        bandwidth: bytes/s of its memory.
        fast: bytes/s that it sends to others of its node.
        slow: bytes/s that it sends to other nodes.
        efficiency: share of the peak that products of a training step reach.
        abilities: what DeepSpeed configs are resolved for.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory: float
    peak: Mapping[torch.dtype, float]
    bandwidth: float
    fast: float
    slow: float
    efficiency: float
    abilities: Device


@dataclass(frozen=True)
class Cluster:
    """Equal nodes; ranks are numbered node by node."""

    nodes: int
    gpus_per_node: int
    device: Accelerator

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise ConfigError(f"{option} = {value}: give a number above 0")

    @property
    def ranks(self) -> int:
        """One for each device."""
        return self.nodes * self.gpus_per_node


GPU_EFFICIENCY = 0.5
"""Assumed, not measured here: large products alone reach more of a datasheet, those of a step are smaller."""


def _gpu(
    name: str, gigabytes: float, half: float, single: float, terabytes: float, fast: float, slow: float
) -> Accelerator:  # fmt: skip
    """From GB, TFLOP/s in 16 and in 32 bits, TB/s, and GB/s of both links."""
    return Accelerator(
        name=name, kind="cuda", memory=gigabytes * 1e9,
        peak={torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: single * 1e12},
        bandwidth=terabytes * 1e12, fast=fast * 1e9, slow=slow * 1e9, efficiency=GPU_EFFICIENCY,
        abilities=Device("cuda", bf16=True, fp16=True),
    )  # fmt: skip


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 19.5, 2.039, 300, 25),
        _gpu("h100", 80, 989.4, 67, 3.35, 450, 50),
        _gpu("h200", 141, 989.4, 67, 4.8, 450, 50),
        _gpu("b200", 180, 2250, 80, 8, 900, 50),
        _gpu("mi300x", 192, 1307.4, 163.4, 5.3, 448, 50),
    )
}
CPU = "cpu"


def accelerator(name: str, per_node: int) -> Accelerator:
    """The device called `name`.

    Args:
        name: in any case; "cpu" is this machine's, which is measured for a second.
        per_node: ranks of a node, which share a CPU.

    Raises:
        ConfigError: it is not in the table; the nearest name is given.
    """
    name = name.lower()
    if name == CPU:
        from megamoe.plan.this_cpu import this_cpu

        return this_cpu(per_node)
    if name not in GPUS:
        raise ConfigError(f"--device = {name!r}: unknown, {nearest(name, [*GPUS, CPU])}")
    return GPUS[name]
