"""What one rank computes in one forward pass, in numbers.

Shapes: B batch, S segment, M memory, C = M + S context, T = B S tokens, K experts per token, R
expert-parallel ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megamoe.config.schema import MoEConfig, RunConfig
from megamoe.moe.mixture import ROW_MULTIPLE, SIXTEEN_BITS
from megamoe.moe.routers import resolve_options, router_class
from megamoe.moe.routing import LayerSpec
from megamoe.moe.schedules import top_k_at
from megamoe.parallel.ds_config import Layout

STEPS_LOOKED_AT = 1000
"""Of a run, spread evenly, to see how k changes."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one forward pass of one rank.

    Attributes:
        run: its vocabulary is known.
        layout: of the ranks.
        on_gpu: not on a CPU, where pieces are small and rows of experts are rounded up.
        top_k: K that is in force.
        batch: B, times two for policies that read each sequence twice.
        choices: experts that a token goes to in one layer, in the mean if routing is as foreseen.
        copies: of the R ranks that share a set of experts, those that own one of a token's; 1 for R = 1.
    """

    run: RunConfig
    layout: Layout
    on_gpu: bool
    top_k: int
    batch: int
    choices: float
    copies: float

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.layout.dtype.itemsize

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.run.model.segment_len

    @property
    def context(self) -> int:
        """C, once the memory is full."""
        return self.run.model.memory_len + self.run.model.segment_len

    @property
    def mixtures(self) -> int:
        """Layers with experts, or with what a policy has in their place."""
        return len(self.run.moe.layer_indices(self.run.model.n_layers))

    @property
    def has_experts(self) -> bool:
        """Whether tokens go to experts at all."""
        return self.mixtures > 0 and not router_class(self.run.moe.router.name).owns_feed_forward

    @property
    def grouped(self) -> bool:
        """Whether experts are computed in one kernel, as `megamoe.moe.experts.choose_path` has it."""
        aligned = self.run.moe.d_expert % 8 == self.run.model.d_model % 8 == 0
        return self.on_gpu and self.layout.dtype == torch.bfloat16 and aligned

    @property
    def row_padding(self) -> float:
        """Rows by which the choices of all local experts of a layer are rounded up, in the mean."""
        rounds = not self.on_gpu and self.layout.dtype in SIXTEEN_BITS
        return self.local_experts * (ROW_MULTIPLE - 1) / 2 if rounds else 0.0

    @property
    def local_experts(self) -> int:
        """Experts of a layer on one rank."""
        return self.run.moe.n_experts // self.layout.ep_size


def workload(run: RunConfig, layout: Layout, *, on_gpu: bool, top_k: int) -> Workload:
    """The sizes of a forward pass with `top_k` in force."""
    cls, options = router_class(run.moe.router.name), resolve_options(run.moe.router)
    routes = cls.routes(options) if run.moe.layer_indices(run.model.n_layers) else 1
    choices, _ = experts_per_token(run.moe, top_k)
    choices /= routes
    return Workload(
        run, layout, on_gpu, top_k, layout.micro_batch_size * routes, choices,
        ranks_per_token(run.moe.n_experts, choices, layout.ep_size),
    )  # fmt: skip


def experts_per_token(moe: MoEConfig, top_k: int) -> tuple[float, bool]:
    """Experts computed for a token in training, and whether that is certain.

    It is not where a policy learns how many: then all that it could take are counted.
    """
    cls, options = router_class(moe.router.name), resolve_options(moe.router)
    known = cls.experts_computed(options, top_k, moe.n_experts)
    if known is not None:
        return known, True
    return (0.0 if cls.owns_feed_forward else float(moe.n_experts)), cls.owns_feed_forward


def largest_top_k(run: RunConfig) -> int:
    """The most that any step has in force."""
    return max(k for k, _ in top_ks(run))


def top_ks(run: RunConfig) -> Iterator[tuple[int, float]]:
    """Each k that training has in force, and its share of the steps."""
    max_steps = run.training.max_steps
    steps = range(0, max_steps, max(1, max_steps // STEPS_LOOKED_AT))
    seen: dict[int, int] = {}
    for step in steps:
        k = top_k_at(run.moe.schedule, run.moe.top_k, step, max_steps)
        seen[k] = seen.get(k, 0) + 1
    for k, count in seen.items():
        yield k, count / len(steps)


def ranks_per_token(n_experts: int, choices: float, n_ranks: int) -> float:
    """How many of `n_ranks` own one of a token's experts, if all sets of so many are equally likely.

    R (1 - binom(E - E/R, K) / binom(E, K)); K is rounded.
    """
    chosen = min(n_experts, round(choices))
    if chosen == 0:
        return 1.0
    elsewhere = math.comb(n_experts - n_experts // n_ranks, chosen)
    return n_ranks * (1 - elsewhere / math.comb(n_experts, chosen))


def checkpointing(run: RunConfig, enabled: bool) -> RunConfig:
    """`run` with activation checkpointing on or off."""
    return replace(run, training=replace(run.training, activation_checkpointing=enabled))


def layer_spec(run: RunConfig) -> LayerSpec:
    """A mixture layer of the run, by whose sizes a policy says what it multiplies."""
    model, moe = run.model, run.moe
    return LayerSpec(
        d_model=model.d_model, n_experts=moe.n_experts, layer=0, seed=0, init_std=model.init_std,
        d_expert=moe.d_expert, n_layers=model.n_layers, vocab_size=model.vocab_size, dropout=model.dropout,
    )  # fmt: skip


def router_options(run: RunConfig) -> Any:
    """The policy's options with their defaults."""
    return resolve_options(run.moe.router)
