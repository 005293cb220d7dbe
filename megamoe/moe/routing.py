"""What a router decides (`Routing`), what it may look at (`RouterContext`), the contract (`Router`).

Shapes: B sequences, T tokens, D model width, E experts, K experts per token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from megamoe.moe.initialization import generator, normal
from megamoe.moe.products import Product
from megamoe.moe.randomness import at_site, draw, hash_of, uniform
from megamoe.moe.ranks import ONE_RANK, Ranks

SMALLEST_UNIFORM = 2.0**-25
"""Half a step of the uniform numbers: added to them, none is 0 or 1."""


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
        sequence_T: the sequence of each token, 0 to B - 1, rising; within one, tokens are in order of
            time. None: all are of one sequence.
        n_sequences: B, also of those without a token here.
        place_T: the place of each token in its segment, from 0; None: a sequence's tokens here are the first
            of its segment. See `selection.places_in_segments`.
        domain_T2: source and target domain of each token's sequence, 0 where unknown; None where the data
            have none.
        route_T: which of the forward passes over the same sequences each token is of, see `Router.routes`;
            None where there is one.
        previous: routing of the mixture layer below, None in the first.
        ranks: the data-parallel ranks, for statistics of the global batch.
    """

    step: int
    seed: int
    top_k: int
    token_ids_T: torch.Tensor | None = None
    token_keys_T: torch.Tensor | None = None
    sequence_T: torch.Tensor | None = None
    n_sequences: int = 1
    place_T: torch.Tensor | None = None
    domain_T2: torch.Tensor | None = None
    route_T: torch.Tensor | None = None
    previous: "Routing | None" = None
    ranks: Ranks = ONE_RANK

    def over_ranks(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean of `mean` over all ranks, whose gradient is that of this rank's share.

        For any function F, the mean over ranks of the gradients of F(over_ranks(m_r)) is the gradient of
        F of the global mean, exactly, where averaging F(m_r) over ranks would be neither.
        """
        return mean + (self.ranks.mean(mean) - mean).detach()


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
        wanted_TK: the choices before capacity took some back, which the balance loss counts; None if
            none was taken back.
        statistics: fp32 [N], without gradient, of this rank's tokens: what `Router.update` learns of
            the step, averaged over ranks and micro-batches. None if the policy has nothing to update.
    """

    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    wanted_TK: torch.Tensor | None = None
    statistics: torch.Tensor | None = None


class Mixture(Protocol):
    """The experts of a layer, for policies that do more than weigh their outputs.

    Every method is a collective: all ranks call the same ones in the same order, with any tokens.
    """

    def combine(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """y_t = sum_j weights_TK[t, j] * Expert_{ids[t, j]}(x_t) [T, D], summed in fp32."""
        ...

    def outputs(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """Expert_{ids[t, j]}(x_t) [T, K, D] in fp32, zero where the id is -1."""
        ...

    def responses(self, x_TD: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`response` ([N, D] fp32 to [N]) of every expert's output for every token, [T, E] fp32.

        Without gradient and without dropout.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The mixture layer that a router is built for.

    Attributes:
        d_model: model width D.
        n_experts: experts E over all ranks.
        layer: 0-based index of the layer in the model.
        seed: the run's seed.
        init_std: standard deviation of initial weights.
        d_expert: hidden width F of an expert.
        n_layers: decoder layers of the model.
        vocab_size: symbols V of the model; 0 where it is not known.
        dropout: dropout on hidden units.
        below: router of the mixture layer below, to share tensors with; None in the lowest.
    """

    d_model: int
    n_experts: int
    layer: int
    seed: int
    init_std: float
    d_expert: int = 1
    n_layers: int = 1
    vocab_size: int = 0
    dropout: float = 0.0
    below: "Router | None" = None

    def path(self, name: str) -> str:
        """Name of the router's tensor or site `name` in the model."""
        return f"layers.{self.layer}.moe.router.{name}"

    def normal(self, name: str, shape: tuple[int, ...], std: float | None = None) -> torch.Tensor:
        """fp32 initial values N(0, std^2) of the router's tensor `name`; std is init_std by default."""
        return normal(shape, self.init_std if std is None else std, self.seed, self.path(name))

    def truncated_normal(self, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """fp32 initial values N(0, std^2), drawn anew beyond 2 std (which leaves 0.88 std)."""
        values = torch.empty(shape)
        draws = generator(self.seed, self.path(name))
        return nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=draws)

    def orthogonal(self, name: str, shape: tuple[int, int], gain: float = 1.0) -> torch.Tensor:
        """fp32 initial values with orthogonal rows, or columns where there are more rows, of norm `gain`."""
        values = self.normal(name, shape, std=1.0)
        rows_are_fewer = shape[0] <= shape[1]
        q, r = torch.linalg.qr(values.t() if rows_are_fewer else values)
        q = gain * q * r.diagonal().sign()
        return q.t().contiguous() if rows_are_fewer else q.contiguous()

    def dense_stds(self) -> tuple[float, float]:
        """Standard deviations of w_in and w_out of a dense network as wide as all experts together.

        For pre-norm models of L layers: sqrt(2 / (D L)) and sqrt(2 / (E F L)).

        Paper: Csordas et al., EMNLP Findings 2023, arXiv 2310.10837, section 5.
        """
        width = self.n_experts * self.d_expert
        return math.sqrt(2 / (self.d_model * self.n_layers)), math.sqrt(2 / (width * self.n_layers))

    def generator(self, name: str, *labels: str | int) -> torch.Generator:
        """A CPU generator for what all tokens share: a function of (seed, layer, name, labels) alone."""
        return generator(self.seed, self.path(name), *labels)

    def uniform(self, name: str, context: RouterContext, width: int) -> torch.Tensor:
        """fp32 noise [T, width], uniform in [0, 1), for training.

        It depends on (seed, step, layer, `name`, token), not on which tokens a rank or a micro-batch holds.
        """
        assert context.token_keys_T is not None, (
            "noise is for training: RouterContext.token_keys_T is missing"
        )
        return uniform(at_site(context.token_keys_T, self.path(name)), width)

    def gaussian(self, name: str, context: RouterContext, width: int) -> torch.Tensor:
        """fp32 noise [T, width], N(0, 1), by inversion of `uniform`."""
        return torch.special.ndtri(self.uniform(name, context, width) + SMALLEST_UNIFORM)

    def gumbel(self, name: str, context: RouterContext, width: int) -> torch.Tensor:
        """fp32 noise [T, width], Gumbel(0, 1): -log(-log u), by inversion of `uniform`."""
        return -(self.uniform(name, context, width) + SMALLEST_UNIFORM).log().neg().log()

    def lasting_uniform(self, name: str, numbers_T: torch.Tensor, width: int) -> torch.Tensor:
        """fp32 [T, width], uniform in [0, 1): a function of (seed, layer, `name`, number) for ever."""
        keys_T = at_site(draw(hash_of(self.seed, "lasting"), numbers_T), self.path(name))
        return uniform(keys_T, width)


class Router(nn.Module, ABC):
    """A routing policy: one subclass per file in `megamoe.moe.routers`.

    A subclass declares its options, if any, as a nested frozen dataclass ``Options`` and is built as
    ``cls(spec, options)``. It draws every initial value with `LayerSpec.normal`, so that it is the
    same on every rank. It routes in fp32, is deterministic in evaluation mode, and owns nothing whose
    name contains "expert" (DeepSpeed reads that word in a name as "belongs to one expert").

    Class attributes:
        summary: one line for `megamoe routers`.
        paper: where the policy was published.
        cost: what its experts compute, relative to plain routing to k experts.
        causal: when a token's routing is independent of later tokens: "always", in "evaluation" alone,
            or "never", and then it is no language model.
        balance_loss: what ``moe.balance_loss=auto`` means for it, in units of a loss that is 1 at balance.
        undecayed: names of its parameters that weight decay leaves alone.
        owns_feed_forward: the layer has no experts; `mix` computes its output alone.
        Options: the dataclass of the policy's options, with defaults and help texts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """No options."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str] = "1"
    causal: ClassVar[Literal["always", "evaluation", "never"]] = "always"
    balance_loss: ClassVar[float] = 0.0
    owns_feed_forward: ClassVar[bool] = False
    undecayed: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: LayerSpec, options: Any) -> None:
        super().__init__()
        self.spec = spec
        self.options = options
        # The layer's 0-based number among the mixture layers.
        self.depth: int = 0 if spec.below is None else spec.below.depth + 1
        self._owner: tuple[Router, ...] = ()

    @property
    def owner(self) -> "Router":
        """The router whose tensors this one uses; itself unless `share` says otherwise."""
        return self._owner[0] if self._owner else self

    def share(self, n_layers: int) -> bool:
        """Use the tensors of the lowest router of each `n_layers` mixture layers in a row (0: of all).

        Called in the constructor of a subclass, before it makes tensors.

        Returns:
            Whether this router is such an owner, and so has to make them.
        """
        is_owner = self.depth % n_layers == 0 if n_layers else self.depth == 0
        if not is_owner:
            assert self.spec.below is not None
            # In a tuple, so that the owner is registered once, where it belongs.
            self._owner = (self.spec.below.owner,)
        return is_owner

    def keep(self, name: str, value: torch.Tensor, learned: bool) -> None:
        """Own `value` as the trained parameter `name`, or else as a buffer: saved, and never in 16 bits."""
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """Experts that a token gets in evaluation where `top_k` are asked for; not all policies follow."""
        return top_k

    @classmethod
    def experts_computed(cls, options: Any, top_k: int, n_experts: int) -> float | None:
        """Experts computed for a token in training, on average, in units of one forward and backward pass.

        None: not known before training. An equal budget of expert FLOPs is dealt out by it.
        """
        return float(cls.experts_per_token(top_k, n_experts))

    @classmethod
    def products(cls, options: Any, spec: LayerSpec, n_tokens: int) -> list[Product] | None:
        """What a training step multiplies for `n_tokens` in one layer, beside the outputs of its experts.

        `megamoe plan` counts by it. None: the policy does not tell.
        """
        return None

    @classmethod
    def routes(cls, options: Any) -> int:
        """How many forward passes of different routing a training step makes over each sequence, 1 or 2.

        With 2, the loss is the mean of both, and the loss ``consistency``, weighted by the option
        ``consistency_loss``, is the symmetric divergence of their predictions.
        """
        return 1

    @classmethod
    def n_domains(cls, options: Any) -> int:
        """Domains of the data that it knows, with ids from 1; 0 if it does not look at domains."""
        return 0

    def initial_stds(self) -> tuple[float, float] | None:
        """Standard deviations of the experts' initial w_in and w_out; None: `spec.init_std` for both."""
        return None

    def __call__(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """`forward`, never in 16 bits."""
        with torch.autocast(x_TD.device.type, enabled=False):
            routing: Routing = super().__call__(x_TD, context)
            return routing

    @abstractmethod
    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Route tokens `x_TD` (any float type; the policy works in fp32)."""

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """Output [T, D] of the layer and the decision behind it.

        By default the weighted sum of the outputs of the experts that `forward` chooses.
        """
        routing = self(x_TD, context)
        return mixture.combine(x_TD, routing.expert_ids_TK, routing.weights_TK), routing

    @torch.no_grad()
    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Change buffers after an optimizer step, the same on every rank. By default nothing.

        Args:
            statistics_LN: `Routing.statistics` averaged over ranks and micro-batches, one row for each of
                the L layers, from below, whose `owner` this is.
            step: optimizer steps done before that one.
        """
