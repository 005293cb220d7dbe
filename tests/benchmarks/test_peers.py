"""Peers compute what they are compared with: outputs and gradients equal ours where they should."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.side_by_side.attention import Classic
from benchmarks.side_by_side.layer import draw_tokens, fast_moe_layer, our_layer
from benchmarks.side_by_side.ours import OurAttention, OurTraining, PlainTraining
from benchmarks.side_by_side.peers.deepspeed_moe import DeepSpeedLayer
from benchmarks.side_by_side.peers.published import PublishedTraining
from benchmarks.side_by_side.peers.transformers_moe import TransformersLayer, equal_width
from benchmarks.side_by_side.step import draw_tokens as draw_text
from megamoe.config import RunConfig
from megamoe.parallel.launch import World
from tests.benchmarks.tiny import TINY

TOKENS = 48


@pytest.fixture
def run() -> RunConfig:
    run = TINY.small.run()
    return replace(run, model=replace(run.model, dropout=0.0))


class BatchFirst(nn.Module):
    """A form whose time comes first."""

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x.transpose(0, 1)).transpose(0, 1)


def gradients(
    module: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Output, gradient of the input and of the parameters, under a gradient without symmetry."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y, x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal_layers(peer: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    for result, expected in zip(gradients(peer, x)[:2], gradients(ours, x)[:2], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_fastmoe_s_algorithm_is_our_layer(run: RunConfig, top_k: int, skewed: bool) -> None:
    ours = our_layer(run, top_k, skewed, dropout=0.0)
    peer = fast_moe_layer(run, ours, dropout=0.0)
    x_TD = draw_tokens(run, TOKENS, "test", 0, torch.float32)
    assert_equal_layers(peer, ours, x_TD)
    theirs, mine = gradients(peer, x_TD)[2], gradients(ours, x_TD)[2]
    assert {f"moe.{name}" for name in theirs} == mine.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradient, mine[f"moe.{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [2, 3])
def test_deepspeed_s_layer_without_drops_is_our_layer(run: RunConfig, world: World, top_k: int) -> None:
    ours = our_layer(run, top_k, skewed=True, dropout=0.0)
    x_TD = draw_tokens(run, TOKENS, "test", 0, torch.float32)
    assert_equal_layers(DeepSpeedLayer(ours.moe, top_k, 0.0), ours, x_TD)
    dropping = DeepSpeedLayer(ours.moe, top_k, 0.0, capacity_factor=1.0)
    assert not torch.allclose(dropping(x_TD), ours(x_TD), atol=1e-3)


def test_both_of_transformers_implementations_are_one_function_of_equal_cost(run: RunConfig) -> None:
    gate_ED = our_layer(run, 2, skewed=False, dropout=0.0).moe.router.state_dict()["weight"]
    eager, grouped = (
        TransformersLayer(gate_ED, run.moe.d_expert, 2, name) for name in ("eager", "grouped_mm")
    )
    grouped.load_state_dict(eager.state_dict())
    assert_equal_layers(grouped, eager, draw_tokens(run, TOKENS, "test", 0, torch.float32))
    assert 3 * equal_width(512) == pytest.approx(2 * 512, rel=0.01)


def test_the_classic_form_is_our_attention(run: RunConfig) -> None:
    ours = OurAttention(run, torch.float32)
    classic = Classic(run, ours)
    context_BCD = torch.randn(2, run.model.segment_len + run.model.memory_len, run.model.d_model)

    batch_first = BatchFirst(classic)
    assert_equal_layers(batch_first, ours, context_BCD)
    theirs, mine = gradients(batch_first, context_BCD)[2], gradients(ours, context_BCD)[2]
    assert {name.removeprefix("form.") for name in theirs} == mine.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(theirs[f"form.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_all_ways_of_training_take_the_same_steps(run: RunConfig, world: World) -> None:
    top_k = TINY.small.top_k
    ways = [PublishedTraining(run, top_k), PlainTraining(run, top_k)]
    ways += [OurTraining(run, top_k, world, stage) for stage in (0, 1, 2)]
    for number in range(3):  # the memory is empty, half full, full
        tokens_BN = draw_text(run, "test", number)
        losses = [way.step(tokens_BN) for way in ways]
        assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-5)
