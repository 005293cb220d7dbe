"""What a router decides (`Routing`), what it may look at (`RouterContext`), the contract (`Router`).

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from megamoe.errors import ConfigError
from megamoe.moe.initialization import normal
from megamoe.moe.randomness import at_site, uniform


def on_one_rank(values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks where there is one rank: the values themselves, without gradient."""
    return values.detach()


@dataclass(frozen=True)
class RouterContext:
    """Everything besides the tokens that a routing decision may depend on.

    All fields are equal on every rank except those of tokens and `previous`, so whatever decides which
    collectives run must be a function of the others.

    Attributes:
        step: optimizer steps done before this forward pass.
        seed: the run's seed, `training.seed`.
        top_k: experts per token in force, K.
        token_ids_T: ids of the input tokens, for policies that look them up.
        token_keys_T: what random numbers of the tokens are drawn from, see `LayerSpec.uniform`; given in
            training.
        previous: routing of the mixture layer below, None in the first.
        mean_over_ranks: averages a small statistic over all data-parallel ranks, without gradient.
    """

    step: int
    seed: int
    top_k: int
    token_ids_T: torch.Tensor | None = None
    token_keys_T: torch.Tensor | None = None
    previous: "Routing | None" = None
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = on_one_rank


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with which weight each output counts.

    Attributes:
        expert_ids_TK: int64, the chosen experts; -1 where a choice goes to no expert. K may differ
            from the top-k in force (a policy may use more or fewer).
        weights_TK: fp32, differentiable, zero where the id is -1; a token's weights need not sum to 1.
        logits_TE: fp32 scores before selection, for losses and health; None if the policy has none.
        losses: auxiliary losses by name, unweighted scalars of the policy's own making. Loss ``x`` is
            weighted by the policy's option ``x_loss``, as ``moe.z_loss`` weighs the z-loss.
        dropped_TK: bool, choices that the policy made and gave up again for lack of capacity (their id
            is -1, as is that of choices it never made); None if there are none.
    """

    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped_TK: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The mixture layer that a router is built for.

    Attributes:
        d_model: model width D.
        n_experts: experts E over all ranks.
        layer: 0-based index of the layer in the model.
        seed: the run's seed.
        init_std: standard deviation of initial weights.
    """

    d_model: int
    n_experts: int
    layer: int
    seed: int
    init_std: float

    def normal(self, name: str, shape: tuple[int, ...], std: float | None = None) -> torch.Tensor:
        """fp32 initial values N(0, std^2) of the router's tensor `name`; std is init_std by default."""
        path = f"layers.{self.layer}.moe.router.{name}"
        return normal(shape, self.init_std if std is None else std, self.seed, path)

    def uniform(self, name: str, context: RouterContext, width: int) -> torch.Tensor:
        """fp32 noise [T, width], uniform in [0, 1), for training.

        It depends on (seed, step, layer, `name`, token), not on which tokens a rank or a micro-batch holds.
        """
        assert context.token_keys_T is not None, (
            "noise is for training: RouterContext.token_keys_T is missing"
        )
        return uniform(at_site(context.token_keys_T, f"layers.{self.layer}.moe.router.{name}"), width)


class Router(nn.Module, ABC):
    """A routing policy: one subclass per file in `megamoe.moe.routers`.

    A subclass declares its options, if any, as a nested frozen dataclass ``Options`` and is built as
    ``cls(spec, options)``. It draws every initial value with `LayerSpec.normal`, so that it is the
    same on every rank. It routes in fp32, is deterministic in evaluation mode, and owns nothing whose
    name contains "expert" (DeepSpeed reads that word in a name as "belongs to one expert").

    Class attributes:
        summary: one line for `megamoe routers`.
        paper: where the policy was published.
        causal: False if a token's routing depends on later tokens.
        Options: the dataclass of the policy's options, with defaults and help texts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """No options."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    causal: ClassVar[bool] = True

    def __init__(self, spec: LayerSpec, options: Any) -> None:
        super().__init__()
        self.spec = spec
        self.options = options

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """Experts that a token gets in evaluation where `top_k` are asked for; not all policies follow."""
        return top_k

    @abstractmethod
    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route tokens `x_TD` (any float type; the policy works in fp32)."""


def choices_per_expert(expert_ids_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """[E] int64, how many choices name each expert; those of -1 count nowhere."""
    bins_N = expert_ids_TK.flatten() + 1
    return bins_N.new_zeros(n_experts + 1).scatter_add(0, bins_N, torch.ones_like(bins_N))[1:]


def check_top_k(top_k: int, n_experts: int) -> None:
    """Refuse a k outside 1..E with the setting's name.

    Raises:
        ConfigError: k is below 1 or above the number of experts.
    """
    if not 1 <= top_k <= n_experts:
        raise ConfigError(f"top_k = {top_k}: give 1 to {n_experts}, the number of experts")


def top_k_softmax(logits_TE: torch.Tensor, top_k: int) -> Routing:
    """Take the k largest logits of each token; weights are the softmax over those k alone.

    Equal to a softmax over all experts renormalised over the chosen ones. At k = 1 the weight is
    exactly 1 and the logits get no gradient from it.
    """
    check_top_k(top_k, logits_TE.shape[-1])
    top_TK, expert_ids_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(expert_ids_TK, torch.softmax(top_TK, dim=-1), logits_TE)
