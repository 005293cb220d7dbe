"""The mixture layer, forward and backward, under routing that no call has seen before.

Shapes: T tokens, D model width, E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.side_by_side import products
from benchmarks.side_by_side.ours import OurLayer, one_rank, with_kernels
from benchmarks.side_by_side.peers.deepspeed_moe import DeepSpeedLayer
from benchmarks.side_by_side.peers.dense import dense
from benchmarks.side_by_side.peers.fastmoe import FastMoEExperts, FastMoELayer, LinearGate
from benchmarks.side_by_side.peers.transformers_moe import IMPLEMENTATIONS, TransformersLayer, why_absent
from benchmarks.side_by_side.sizes import Sizes
from benchmarks.side_by_side.timing import DTYPES, Case, Way, cast, clock_of, deviation, forget_gradients
from megamoe.config import RunConfig
from megamoe.moe.initialization import normal

SECTION = "layer"
SKEW = 2.0
"""Routing is skewed by a ramp of logits from plus to minus this; logits of balanced routing have spread 1."""

OURS, PLAIN_OURS = "ours", "ours, p = 0"
COMPILED = "ours, compiled kernels"
FASTMOE, PLAIN_FASTMOE = "fastmoe's algorithm", "fastmoe's algorithm, p = 0"
DEEPSPEED, PLAIN_DEEPSPEED = "DeepSpeed", "DeepSpeed, p = 0"
DROPPING_DEEPSPEED = "DeepSpeed, capacity 1"
TRANSFORMERS = "transformers, {}, p = 0"
DENSE, FLOOR = "dense FFN", "bare products"

MOST = {"fp32": 1e-5, "bf16": 5e-2}
"""How far outputs may be apart where they should be equal; near ties are decided otherwise in bf16."""


def our_layer(run: RunConfig, top_k: int, skewed: bool, dropout: float) -> OurLayer:
    """Our layer with weights of this benchmark's making.

    The first number of every token is 1, so that the first column of the router's weight is a bias, which not
    all peers have.
    """
    layer = OurLayer(run, top_k, dropout)
    gate_ED = layer.moe.router.state_dict()["weight"]
    gate_ED.copy_(normal(tuple(gate_ED.shape), gate_ED.shape[1] ** -0.5, 1, "gate"))
    gate_ED[:, 0] = torch.linspace(SKEW, -SKEW, len(gate_ED)) if skewed else 0.0
    for name, parameter in layer.moe.named_parameters():
        if name.rpartition(".")[2] in ("b_in", "b_out"):
            parameter.data.copy_(normal(tuple(parameter.shape), 0.02, 1, name))
    return layer


def draw_tokens(run: RunConfig, tokens: int, way: str, number: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens [T, D] of call `number` of a way."""
    x_TD = normal((tokens, run.model.d_model), 1.0, number, way)
    x_TD[:, 0] = 1.0
    return x_TD.to(dtype)


def fast_moe_layer(run: RunConfig, ours: OurLayer, dropout: float) -> FastMoELayer:
    """fastmoe's algorithm with the weights of ours."""
    d_model, moe = run.model.d_model, run.moe
    layer = FastMoELayer(
        LinearGate(d_model, moe.n_experts),
        FastMoEExperts(d_model, moe.n_experts, moe.d_expert, dropout),
        ours.top_k,
    )
    layer.load_state_dict(ours.moe.state_dict())
    return layer


def layers(run: RunConfig, top_k: int, skewed: bool) -> dict[str, nn.Module]:
    """All ways of being that layer, by name, in fp32."""
    p = run.model.dropout
    with_dropout, without = our_layer(run, top_k, skewed, p), our_layer(run, top_k, skewed, 0.0)
    found: dict[str, nn.Module] = {
        OURS: with_dropout,
        FASTMOE: fast_moe_layer(run, with_dropout, p),
        DEEPSPEED: DeepSpeedLayer(with_dropout.moe, top_k, p),
        DROPPING_DEEPSPEED: DeepSpeedLayer(with_dropout.moe, top_k, p, capacity_factor=1.0),
        DENSE: dense(run.model.d_model, top_k * run.moe.d_expert, p),
        PLAIN_OURS: without,
        PLAIN_FASTMOE: fast_moe_layer(run, without, 0.0),
        PLAIN_DEEPSPEED: DeepSpeedLayer(without.moe, top_k, 0.0),
    }
    if why_absent():
        return found
    gate_ED = without.moe.router.state_dict()["weight"]
    return found | {
        TRANSFORMERS.format(name): TransformersLayer(gate_ED, run.moe.d_expert, top_k, name)
        for name in IMPLEMENTATIONS
    }


def way_of(name: str, layer: nn.Module, draw: Callable[[int], torch.Tensor]) -> Way:
    """Forward and backward pass of a layer."""

    def fresh(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        forget_gradients(layer)
        x_TD = draw(number)
        return x_TD.requires_grad_(), torch.ones_like(x_TD) / len(x_TD)

    def run(x_TD: torch.Tensor, gradient_TD: torch.Tensor) -> None:
        layer(x_TD).backward(gradient_TD)

    return Way(name, run, fresh)


@torch.no_grad()
def agreement(ways: dict[str, nn.Module], x_TD: torch.Tensor, dtype: str) -> dict[str, float]:
    """How far outputs without dropout deviate from ours, of those that compute the same function.

    In bf16 fastmoe's router works in bf16 and chooses otherwise now and then; it is compared in fp32 alone.
    """
    same = [DEEPSPEED, PLAIN_DEEPSPEED] + ([FASTMOE, PLAIN_FASTMOE] if dtype == "fp32" else [])
    for layer in ways.values():
        layer.eval()
    expected = ways[OURS](x_TD)
    found = {name: deviation(ways[name](x_TD), expected, MOST[dtype], name) for name in same}
    for layer in ways.values():
        layer.train()
    return found


def measure_case(sizes: Sizes, threads: int, tokens: int, top_k: int, skewed: bool, dtype: str) -> Case:
    """All ways at one size."""
    run = sizes.small.run()
    built = {name: cast(layer, DTYPES[dtype]) for name, layer in layers(run, top_k, skewed).items()}
    found = agreement(built, draw_tokens(run, tokens, "agreement", 0, DTYPES[dtype]), dtype)

    def draw(name: str) -> Callable[[int], torch.Tensor]:
        return lambda number: draw_tokens(run, tokens, name, number, DTYPES[dtype])

    ways = [way_of(name, layer, draw(name)) for name, layer in built.items()]
    compiled = way_of(COMPILED, built[OURS], draw(COMPILED))
    ways.append(replace(compiled, run=with_kernels(compiled.run)))
    ways.append(Way(FLOOR, products.Products(products.mixture(run, tokens, top_k), DTYPES[dtype])))
    settings = {
        "tokens": tokens, "top_k": top_k, "routing": "skewed" if skewed else "balanced", "dtype": dtype,
        "threads": threads,
    }  # fmt: skip
    return Case(SECTION, settings, sizes.turns.take(ways, clock_of(threads)), agreement=found)


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """All cases; where every expert is chosen, routing cannot be skewed."""
    one_rank()
    n_experts = sizes.small.run().moe.n_experts
    for dtype in DTYPES:
        for tokens in sizes.tokens:
            for top_k in sizes.top_ks:
                for skewed in (False, True) if top_k < n_experts else (False,):
                    yield measure_case(sizes, threads, tokens, top_k, skewed, dtype)
