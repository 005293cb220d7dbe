"""What a mixture layer does beside its experts: routing, losses, health, sorting, the exchange."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.scaling.alone import one_rank_of
from benchmarks.scaling.quantity import POLICY, Action, Quantity, Sizes
from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.health import agreement, routing_health
from megamoe.moe.mixture import Choices
from megamoe.moe.randomness import token_keys
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers import build_router
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.updates import update_routers
from megamoe.parallel.exchange import AllToAllExchange

D = 64
"""Width of a token: small, so that the product of tokens and router hides nothing else."""
K = 2
SEGMENT = 512
POLICIES = {
    "hyper": "generated router, top-k, softmax",
    "smoe": "top-k, softmax",
    "switch": "jitter, top-1, capacity, balance loss",
    "bias_balanced": "top-k with a bias, loads",
    "expert_choice": "experts rank the tokens of each sequence",
    "similarity": "top-k, table of pairs of experts",
    "base": "linear assignment in each sequence",
}
BY_NATURE = ("similarity", "base", "expert_choice")
"""Policies defined by something that grows faster: E x E pairs, an assignment, tokens x experts choices."""


def quantities(sizes: Sizes) -> Iterator[Quantity]:
    """Everything above, by tokens, experts and expert-parallel ranks."""
    for name, does in POLICIES.items():
        owner = {"owner": POLICY} if name in BY_NATURE else {}
        yield from _by_tokens_and_experts(f"route, {name}: {does}", sizes, _routed(name), **owner)
    yield from _by_tokens_and_experts("balance and z-loss", sizes, _losses)
    yield from _by_tokens_and_experts("health and agreement", sizes, _health, when="step")
    yield from _by_tokens_and_experts("one rank: sort choices by expert", sizes, _sorted)
    t, e, r = sizes.n_tokens, sizes.n_experts, sizes.ep_size
    exchange = "all-to-all: plan, gather, bring home"
    yield Quantity(exchange, "layer", "T", sizes.tokens, lambda n: _exchanged(n, e, r), {"E": e, "R": r})
    experts = tuple(n for n in sizes.experts if n >= r)
    yield Quantity(exchange, "layer", "E", experts, lambda n: _exchanged(t, n, r), {"T": t, "R": r})
    most = max(sizes.ep_sizes)
    yield Quantity(
        exchange, "layer", "R", sizes.ep_sizes, lambda n: _exchanged(t, most, n), {"T": t, "E": most}
    )
    yield Quantity("keys of tokens", "layer", "T", sizes.tokens, _keys, {})


def _by_tokens_and_experts(
    name: str, sizes: Sizes, at: Callable[[int, int], Any], *, when: Any = "layer", **more: Any
) -> Iterator[Quantity]:
    t, e = sizes.n_tokens, sizes.n_experts
    yield Quantity(name, when, "T", sizes.tokens, lambda n: at(n, e), {"E": e}, **more)
    yield Quantity(name, when, "E", sizes.experts, lambda n: at(t, n), {"T": t}, **more)


class _NoExperts:
    """A mixture whose experts give back what they get; `routing.Mixture`."""

    def combine(
        self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        return x_TD * weights_TK.sum(1, keepdim=True)

    def outputs(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        return x_TD[:, None].expand(-1, expert_ids_TK.shape[1], -1)

    def responses(self, x_TD: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


def _routed(name: str) -> Callable[[int, int], Any]:
    """Forward and backward pass of a policy with its losses, and what it learns of the step."""

    @contextmanager
    def at(n_tokens: int, n_experts: int) -> Iterator[Action]:
        segment_len = min(SEGMENT, n_tokens)
        n_sequences = n_tokens // segment_len
        moe = MoEConfig(n_experts=n_experts, top_k=K, router=RouterConfig(name=name))
        spec = LayerSpec(d_model=D, n_experts=n_experts, layer=0, seed=1, init_std=0.02)
        router = build_router(moe.router, spec).train()
        x_TD = torch.randn(n_tokens, D, requires_grad=True)
        context = RouterContext(
            step=0, seed=1, top_k=K, n_sequences=n_sequences,
            token_keys_T=token_keys(1, 0, range(n_sequences), segment_len).flatten(),
            sequence_T=torch.arange(n_sequences).repeat_interleave(segment_len),
        )  # fmt: skip

        def route() -> None:
            y_TD, routing = router.mix(x_TD, context, _NoExperts())
            loss, _ = auxiliary_loss([routing], moe, ONE_RANK.mean)
            (y_TD.sum() + loss).backward()
            update_routers([router], [[routing]], ONE_RANK, 0)

        yield route

    return at


def _random_routing(n_tokens: int, n_experts: int) -> Routing:
    logits_TE = torch.randn(n_tokens, n_experts, requires_grad=True)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(K)
    return Routing(ids_TK, weights_TK.detach(), logits_TE)


@contextmanager
def _losses(n_tokens: int, n_experts: int) -> Iterator[Action]:
    routing = _random_routing(n_tokens, n_experts)
    moe = MoEConfig(n_experts=n_experts, balance_loss=0.01, z_loss=0.001)
    yield lambda: auxiliary_loss([routing], moe, ONE_RANK.mean)[0].backward()


@contextmanager
def _health(n_tokens: int, n_experts: int) -> Iterator[Action]:
    routings = [_random_routing(n_tokens, n_experts) for _ in range(2)]
    yield lambda: (routing_health(routings, n_experts), agreement(routings))


@contextmanager
def _sorted(n_tokens: int, n_experts: int) -> Iterator[Action]:
    ids_TK, x_TD = _random_choices(n_tokens, n_experts), torch.randn(n_tokens, D)
    exchange = LocalExchange()

    def sort() -> None:
        arrived = exchange.dispatch(x_TD, ids_TK, None, n_experts, None)
        Choices.of(arrived.token_P, arrived.expert_P, n_experts)

    yield sort


@contextmanager
def _exchanged(n_tokens: int, n_experts: int, n_ranks: int) -> Iterator[Action]:
    ids_TK = _random_choices(n_tokens, n_experts)
    x_TD, weights_TK = torch.randn(n_tokens, D), torch.rand(ids_TK.shape)
    keys_T = torch.arange(n_tokens)
    with one_rank_of(n_ranks):
        assert torch.distributed.group.WORLD is not None
        exchange = AllToAllExchange(torch.distributed.group.WORLD)

        def there_and_back() -> None:
            arrived = exchange.dispatch(x_TD, ids_TK, weights_TK, n_experts, keys_T)
            exchange.bring_home(arrived.x_ND, arrived)

        yield there_and_back


def _random_choices(n_tokens: int, n_experts: int) -> torch.Tensor:
    return torch.randint(n_experts, (n_tokens, K))


@contextmanager
def _keys(n_tokens: int) -> Iterator[Action]:
    segment_len = min(SEGMENT, n_tokens)
    yield lambda: token_keys(1, 0, range(n_tokens // segment_len), segment_len)
