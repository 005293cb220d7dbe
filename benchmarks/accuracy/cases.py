"""What is measured: shapes of models, and how they lie on ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megamoe.config import RunConfig, load_config
from megamoe.moe.routers.registry import available
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout, layout_of, resolve_ds_config

VOCAB_SIZE = 256
"""Of bytes."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A small run, by what it changes of a preset.

    Attributes:
        name: for the report.
        overrides: dotted options.
        preset: that is changed.
    """

    name: str
    overrides: tuple[str, ...] = ()
    preset: str = "tiny_enwik8"

    def run(self) -> RunConfig:
        """Its config; the number of experts per token does not change from step to step."""
        fixed = (f"model.vocab_size={VOCAB_SIZE}", "moe.schedule.mode=constant")
        return load_config(preset=self.preset, overrides=[*fixed, *self.overrides])


EVEN = Shape(
    "even",
    (
        "model.d_model=32", "model.n_heads=2", "model.d_head=16", "model.d_inner=64", "model.segment_len=64",
        "model.memory_len=64", "model.dropout=0.1", "moe.n_experts=8", "moe.d_expert=48", "moe.top_k=2",
        "moe.router.name=random", "training.batch_size=16",
    ),
)  # fmt: skip
"""Every choice of experts is equally likely, as predictions assume."""

ODD = Shape(
    "odd",
    (
        "model.n_layers=3", "model.d_model=46", "model.n_heads=3", "model.d_head=14", "model.d_inner=91",
        "model.segment_len=48", "model.memory_len=80", "moe.layers=0,2", "moe.n_experts=12",
        "moe.d_expert=35", "moe.top_k=3", "moe.router.hyper_size=17", "training.batch_size=8",
        "training.micro_batch_size=1", "optimizer.weight_decay=0.1",
    ),
)  # fmt: skip
"""Numbers that ranks do not divide, a layer without experts, accumulation, decay apart from no decay."""

DEEP = Shape(
    "deep",
    (
        "model.n_layers=4", "model.d_model=64", "model.pre_norm=true", "moe.layers=1,3", "moe.n_experts=8",
        "moe.d_expert=64", "moe.top_k=2", "moe.router.name=random", "model.dropout=0.1",
        "model.attention_dropout=0.1",
        "training.activation_checkpointing=true", "training.batch_size=8",
    ),
)  # fmt: skip
"""Pre-norm, layers with experts and without, activations that are computed again."""


@dataclass(frozen=True)
class Case:
    """A run on ranks.

    Attributes:
        shape: the run.
        ranks: of the world.
        ep_size: that share one set of experts.
        stage: of ZeRO.
        dtype: one of `DTYPES`.
        bucket: numbers that are reduced together; None leaves it to the defaults.
    """

    shape: Shape
    ranks: int
    ep_size: int
    stage: int
    dtype: str = "fp32"
    bucket: int | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        bucket = f", buckets of {self.bucket:,}" if self.bucket else ""
        return (
            f"{self.shape.name}, {self.ranks} rank{'s' * (self.ranks > 1)}, EP {self.ep_size}, ZeRO"
            f" {self.stage}, {self.dtype}{bucket}"
        )

    def run(self) -> RunConfig:
        """Stage 0 cannot clip by the norm of experts on several ranks."""
        run = self.shape.run()
        return replace(
            run,
            moe=replace(run.moe, ep_size=self.ep_size),
            training=replace(run.training, grad_clip=0.0 if self.stage == 0 else run.training.grad_clip),
        )

    def ds_config(self) -> dict[str, Any]:
        """Resolved for its world."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.bucket:
            zero["reduce_bucket_size"] = self.bucket
        ds = {"zero_optimization": zero, "bf16": {"enabled": self.dtype == "bf16"}}
        return resolve_ds_config(self.run(), ds, self.ranks, Device.detect())

    def layout(self) -> Layout:
        """How it lies on its ranks."""
        return layout_of(self.run(), self.ds_config(), self.ranks)


SMALL_BUCKET = 20_000
"""So few numbers that small models fill several buckets, and that some tensors are larger than one."""


def under(policy: str) -> Shape:
    """The even shape under another policy."""
    return Shape(policy, (*EVEN.overrides, f"moe.router.name={policy}"))


def all_cases(worlds: tuple[int, ...] = (1, 2, 4)) -> Iterator[Case]:
    """Every policy on one rank; every expert-parallel size and stage of every world, in fp32 and harder ones.

    Cases of one world follow each other.
    """
    yield from (Case(under(policy), 1, 1, 1) for policy in available())
    for ranks in worlds:
        for ep_size in (1, 2, 4):
            if ranks % ep_size:
                continue
            for stage in (0, 1, 2):
                yield Case(EVEN, ranks, ep_size, stage)
                if stage:
                    yield Case(ODD, ranks, ep_size, stage, "bf16", SMALL_BUCKET)
                    yield Case(DEEP, ranks, ep_size, stage)


def in_thirds(preset: str, streams: int, *overrides: str) -> Shape:
    """A preset whose step is of three micro-batches of so many streams."""
    sizes = f"training.batch_size={3 * streams}", f"training.micro_batch_size={streams}"
    return Shape(f"{preset}, {streams} streams", (*sizes, *overrides), preset)


PEAKS = (
    Case(in_thirds("tiny_enwik8", 16), 1, 1, 1),
    Case(in_thirds("small_enwik8", 2, "moe.top_k=8"), 1, 1, 1),
    Case(in_thirds("small_enwik8", 4, "moe.top_k=2"), 1, 1, 1, "bf16"),
    Case(in_thirds("medium_enwik8", 3, "training.activation_checkpointing=true"), 1, 1, 1),
)
"""Runs whose peak memory is measured."""
