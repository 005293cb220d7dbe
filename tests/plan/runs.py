"""Small runs, and clusters for them."""

from collections.abc import Mapping
from typing import Any

import torch

from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout
from megamoe.plan.devices import Accelerator, Cluster

# Two blocks of queries, so that what the causal mask cuts off shows.
SMALL: dict[str, Any] = {
    "model": {
        "vocab_size": 50, "n_layers": 3, "d_model": 32, "n_heads": 2, "d_head": 12, "d_inner": 72,
        "segment_len": 160, "memory_len": 96, "dropout": 0.1,
    },
    "moe": {
        "layers": "0,2", "n_experts": 8, "d_expert": 24, "top_k": 2, "router": {"name": "smoe"},
    },
    "training": {"batch_size": 3},
}  # fmt: skip

CPU = Accelerator(
    name="cpu", kind="cpu", memory=16e9, peak={torch.float32: 1e11, torch.bfloat16: 2e11}, bandwidth=1e10,
    fast=1e9, slow=1e8, efficiency=0.8, abilities=Device("cpu", bf16=True, fp16=False),
)  # fmt: skip
"""Figures that are easy to reckon with."""


def small_run(**sections: Mapping[str, Any]) -> RunConfig:
    return from_dict(merge(SMALL, sections))


def one_rank(run: RunConfig, dtype: torch.dtype = torch.float32) -> Layout:
    return Layout(1, 1, run.training.batch_size, 1, 1, dtype)


ALONE = Cluster(1, 1, CPU)
