"""Layers, tokens and contexts on which every routing policy is tried."""

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import token_keys
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers.registry import BUILT_IN
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.updates import update_routers
from tests.oracles.routers import Decided, Given

B, S, D, E, F, V = 3, 8, 6, 4, 10, 11
STEP = 3


def oracle(name: str) -> ModuleType:
    return importlib.import_module(f"tests.oracles.routers.{name}")


def oracle_cases() -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name in BUILT_IN for options in getattr(oracle(name), "CASES", [{}])]


def fresh_layer(name: str, options: dict[str, Any] | None = None, layer: int = 1) -> MoELayer:
    router = RouterConfig(name=name, options=options or {})
    moe = MoEConfig(n_experts=E, d_expert=F, top_k=1, router=router)
    return MoELayer(D, moe, layer=layer, seed=5, dropout=0.0, init_std=0.5, n_layers=2, vocab_size=V)


def build_layer(name: str, options: dict[str, Any] | None = None) -> MoELayer:
    """A layer in float64 in which no parameter is zero, after two steps that only its policy learns from."""
    mixture = fresh_layer(name, options).double()
    draws = torch.Generator().manual_seed(8)
    for parameter in mixture.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draws), alpha=0.2)
    for step in range(STEP - 1):
        learn(mixture, tokens(seed=20 + step), context_of(step=step))
    return mixture


@torch.no_grad()
def learn(mixture: MoELayer, x_BSD: torch.Tensor, context: RouterContext) -> None:
    """What a training step tells the policy outside its gradients."""
    _, routing = mixture(x_BSD, context)
    update_routers([mixture.router], [[routing]], ONE_RANK, context.step)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def context_of(top_k: int = 2, step: int = STEP, rows: range = range(B), seed: int = 5) -> RouterContext:
    """For the sequences `rows` of a global batch."""
    row_B = torch.arange(rows.start, rows.stop)
    ids_TV = torch.randint(0, V, (rows.stop * S,), generator=torch.Generator().manual_seed(1))
    logits_TE = torch.randn(rows.stop * S, E, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    logits_TE = logits_TE[rows.start * S :]
    top_TK, below_TK = logits_TE.topk(2)
    return RouterContext(
        step=step,
        seed=seed,
        top_k=top_k,
        token_ids_T=ids_TV[rows.start * S :],
        token_keys_T=token_keys(seed, step, rows, S).flatten(),
        sequence_T=torch.arange(len(rows)).repeat_interleave(S),
        n_sequences=len(rows),
        route_T=(row_B % 2).repeat_interleave(S),
        domain_T2=torch.stack([(2 - row_B) % 3, row_B % 3], 1).repeat_interleave(S, 0),
        previous=Routing(below_TK, top_TK.softmax(-1), logits_TE),
    )


def apply(
    mixture: MoELayer, x_BSD: torch.Tensor, context: RouterContext
) -> tuple[torch.Tensor, Routing, dict[str, torch.Tensor]]:
    """Output, routing, and gradients by name of one number made of the output and all own losses."""
    mixture.zero_grad()
    x_BSD = x_BSD.detach().clone().requires_grad_()
    y_BSD, routing = mixture(x_BSD, context)
    scalar(y_BSD.flatten(0, 1), routing.losses).backward()
    gradients = {"x": x_BSD.grad.flatten(0, 1)}
    for name, parameter in mixture.named_parameters():
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return y_BSD.detach().flatten(0, 1), routing, gradients


def scalar(y_TD: torch.Tensor, losses: dict[str, torch.Tensor]) -> torch.Tensor:
    factors = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    total = (y_TD * factors).sum()
    for index, name in enumerate(sorted(losses)):
        total = total + (0.7 + index) * losses[name]
    return total


def apply_oracle(
    mixture: MoELayer, x_BSD: torch.Tensor, context: RouterContext, name: str
) -> tuple[Decided, dict[str, torch.Tensor]]:
    """The same by the policy's oracle."""
    leaves = {key: value.detach().double().clone() for key, value in mixture.state_dict().items()}
    trained = [key for key, _ in mixture.named_parameters()]
    for key in trained:
        leaves[key].requires_grad_()
    x_TD = x_BSD.detach().flatten(0, 1).clone().requires_grad_()

    def expert(e: int, token: torch.Tensor) -> torch.Tensor:
        w_in, b_in, w_out, b_out = (
            leaves[f"experts.{leaf}"][e] for leaf in ("w_in", "b_in", "w_out", "b_out")
        )
        return w_out @ torch.clamp(w_in @ token + b_in, min=0) + b_out

    router = mixture.router
    given = Given(
        x_TD=x_TD,
        state={key[7:]: value for key, value in leaves.items() if key.startswith("router.")},
        options=router.options,
        training=router.training,
        context=replace(context),
        spec=router.spec,
        expert=expert,
    )
    decided = oracle(name).route(given)
    scalar(decided.y_TD, decided.losses).backward()
    gradients = {"x": x_TD.grad}
    for key in trained:
        gradients[key] = torch.zeros_like(leaves[key]) if leaves[key].grad is None else leaves[key].grad
    return decided, gradients
