"""Who takes part in a comparison, and what an equal budget gives each: one run config for each seed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from megamoe.config.load import parse_overrides
from megamoe.config.schema import RouterConfig, RunConfig
from megamoe.errors import ConfigError
from megamoe.models.model_of import model_of
from megamoe.models.parameter_counts import ParameterCounts, parameter_counts
from megamoe.moe.routers import resolve_options, router_class
from megamoe.moe.schedules import top_k_at
from megamoe.training.evaluation import require_causal

Budget = Literal["tokens", "flops", "parameters"]


@dataclass(frozen=True)
class Contestant:
    """A policy with its options, and the run that the budget gives it.

    Attributes:
        label: what tables call it: the name, and the options that were given.
        run: with its steps and sizes; seed and name of each run are still to come.
        parameters: of its model.
        experts_computed: experts computed for a token in training, in forward and backward passes; None if
            that is not known before training.
    """

    label: str
    run: RunConfig
    parameters: ParameterCounts
    experts_computed: float | None

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.label)

    def seeded(self, seed: int) -> RunConfig:
        """The run of one seed, in the folder that slurm/compare_routers.sh gives it too."""
        return replace(
            self.run,
            training=replace(self.run.training, seed=seed),
            name=f"{self.run.name}/{self.slug}-seed{seed}",
        )


def read_router(text: str, base: RouterConfig) -> RouterConfig:
    """The policy that ``compete:rate=0.1:temperature=0.05`` names, with those options; + parts a list.

    Args:
        base: gives its options to the policy that it names.

    Raises:
        ConfigError: an unknown policy or option.
    """
    name, *settings = text.replace("+", ",").split(":")
    options = base.options if name == base.name else {}
    router = RouterConfig(name=name, options={**options, **parse_overrides(settings)})
    resolve_options(router)
    return router


def contestants(base: RunConfig, routers: Sequence[str], budget: Budget) -> list[Contestant]:
    """One for each of `routers`, under a budget that is equal for all.

    tokens: as many steps for all. flops: equal FLOPs in experts over the whole run, those of routing to k
    experts for as many steps as `base` says; a policy that computes fewer experts trains longer.
    parameters: as many steps, and expert widths with which all models have as many trained parameters as
    the first.

    Args:
        base: the run without a policy; its vocabulary is known.
        routers: as `read_router` takes them.

    Raises:
        ConfigError: a policy or option is unknown, named twice, does not fit the model, or cannot be given
            the budget.
    """
    if len(set(routers)) < len(routers):
        twice = next(router for router in routers if routers.count(router) > 1)
        raise ConfigError(f"--routers: {twice!r} is named twice; name each once")
    found: list[Contestant] = []
    for label in routers:
        run = replace(base, moe=replace(base.moe, router=read_router(label, base.moe.router)))
        require_causal(run)
        if budget == "flops":
            run = _with_equal_flops(run, label)
        elif budget == "parameters" and found:
            run = _with_parameters(run, found[0].parameters.trainable)
        found.append(Contestant(label, run, count(run), mean_experts(run)))
    return found


def count(run: RunConfig) -> ParameterCounts:
    """Parameters of the model of `run`, which is not built."""
    with torch.device("meta"):
        return parameter_counts(model_of(run))


def mean_experts(run: RunConfig) -> float | None:
    """Experts computed for a token, averaged over the steps of the run; None if not known."""
    moe, cls, options = run.moe, router_class(run.moe.router.name), resolve_options(run.moe.router)
    by_k: dict[int, float | None] = {}
    for top_k in _scheduled(run):
        by_k.setdefault(top_k, cls.experts_computed(options, top_k, moe.n_experts))
    known = [by_k[top_k] for top_k in _scheduled(run)]
    numbers = [value for value in known if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(known) else None


def _scheduled(run: RunConfig) -> list[int]:
    """k at up to a thousand steps, spread evenly over the run."""
    max_steps = run.training.max_steps
    steps = range(0, max_steps, max(1, max_steps // 1000))
    return [top_k_at(run.moe.schedule, run.moe.top_k, step, max_steps) for step in steps]


def _with_equal_flops(run: RunConfig, label: str) -> RunConfig:
    experts = mean_experts(run)
    if experts is None:
        raise ConfigError(
            f"--budget = 'flops': how many experts {label!r} computes is not known before training; leave it"
            " out, or compare at --budget tokens"
        )
    scheduled = _scheduled(run)
    plain = sum(scheduled) / len(scheduled)
    max_steps = max(1, round(run.training.max_steps * plain / experts))
    return replace(run, training=replace(run.training, max_steps=max_steps))


def _with_parameters(run: RunConfig, target: int) -> RunConfig:
    """`run` with the expert width whose number of trained parameters is nearest to `target`."""

    def wide(d_expert: int) -> RunConfig:
        return replace(run, moe=replace(run.moe, d_expert=d_expert))

    def excess(d_expert: int) -> int:
        return count(wide(d_expert)).trainable - target

    width = run.moe.d_expert
    # Parameters grow evenly with the width.
    slope = excess(width + 1) - excess(width)
    guess = max(1, width - round(excess(width) / max(slope, 1)))
    return wide(min((guess + step for step in (-1, 0, 1) if guess + step > 0), key=lambda f: abs(excess(f))))


def plain(options: Any) -> dict[str, Any]:
    """A policy's resolved options as JSON can hold them."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
