"""The expert-parallel layer: its share of the experts, its marks, and use without a DeepSpeed engine."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import has_moe_layers, is_moe_param

from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.layer import MoELayer
from megamoe.parallel.ds_config import Layout
from megamoe.parallel.exchange import AllToAllExchange
from megamoe.parallel.launch import forget_groups, read_launch, start
from megamoe.parallel.layer import ExpertParallelMoELayer, connect_experts, moe_layer_builder
from tests.parallel.runs import VOCAB, small_run
from tests.ranks import run_ranks

MOE = small_run().moe
SETTINGS: dict[str, Any] = {"layer": 1, "seed": 5, "dropout": 0.0, "init_std": 0.2}


def layer_of(rank: int, ep_size: int) -> ExpertParallelMoELayer:
    return ExpertParallelMoELayer(16, MOE, ep_size=ep_size, rank=rank, **SETTINGS)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_ranks_hold_the_experts_of_the_whole_layer_between_them(ep_size: int) -> None:
    whole = MoELayer(16, MOE, **SETTINGS)
    parts = [layer_of(rank, ep_size) for rank in range(ep_size)]
    for name, tensor in whole.experts.named_parameters():
        together = torch.cat([part.experts.get_parameter(name) for part in parts])
        assert torch.equal(together, tensor)
    for name, tensor in whole.router.state_dict().items():
        assert all(torch.equal(part.router.state_dict()[name], tensor) for part in parts)


def test_groups_are_ranks_in_a_row() -> None:
    assert [list(layer_of(rank, 4).experts.local) for rank in (0, 3, 4)] == [[0, 1], [6, 7], [0, 1]]


def test_deepspeed_recognises_the_layer_and_finds_nothing_of_its_own_in_it() -> None:
    layer = layer_of(1, 2)
    assert isinstance(layer, MoE)
    assert has_moe_layers(layer) == (True, 8)
    assert not hasattr(layer, "deepspeed_moe")
    assert {type(child).__name__ for child in layer.children()} == {"HyperRouter", "Experts"}
    for name, parameter in layer.named_parameters():
        assert is_moe_param(parameter) == name.startswith("experts.")
        assert getattr(parameter, "group_name", None) == (
            "ep_size_2" if name.startswith("experts.") else None
        )


def test_stage_3_takes_plain_layers() -> None:
    assert moe_layer_builder(Layout(4, 1, 1, 1, 3, torch.float32), rank=3) is MoELayer


def evaluate_without_engine() -> list[Any]:
    """Loss per token of a model spread over the ranks, and of the whole one, at several k."""
    world = start(read_launch())
    run = small_run()
    config = replace(run.model, vocab_size=VOCAB)
    ids_BS = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(world.rank))
    whole = TransformerXL(config, run.moe, seed=2).eval()
    result: list[Any] = []
    for ep_size in (1, world.world_size):
        forget_groups()
        layout = Layout(world.world_size, ep_size, 4, 1, 1, torch.float32)
        spread = TransformerXL(
            config, run.moe, seed=2, build_moe_layer=moe_layer_builder(layout, world.rank)
        ).eval()
        connect_experts(spread)
        exchange = LocalExchange if ep_size == 1 else AllToAllExchange
        result.append(all(type(layer.exchange) is exchange for layer in spread.moe_layers))
        with torch.inference_mode():
            for k in (1, 3, 8):
                losses = [model(ids_BS, ids_BS, top_k=k).loss_BS for model in (spread, whole)]
                result.append(float((losses[0] - losses[1]).abs().max()))
    return result


@pytest.mark.distributed
def test_a_spread_model_evaluates_like_the_whole_one() -> None:
    for right_exchange_1, *deviations_1, right_exchange_2, d1, d2, d3 in run_ranks(
        evaluate_without_engine, 2
    ):
        assert right_exchange_1 and right_exchange_2
        assert max(*deviations_1, d1, d2, d3) < 1e-5
