"""Parameters in named groups, and which Adam gets them."""

from dataclasses import replace

import pytest
import torch

from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout
from megamoe.parallel.layer import moe_layer_builder
from megamoe.parallel.optimizer import Group, build_optimizer, parameter_groups
from tests.parallel.runs import VOCAB, small_run

CPU = Device("cpu", bf16=False, fp16=False)
ROLES = {"router_no_decay", "shared_decay", "shared_no_decay", "experts_decay", "experts_no_decay"}


def build(ep_size: int = 2, stage: int = 1) -> TransformerXL:
    run = small_run()
    layout = Layout(2, ep_size, 4, 1, stage, torch.float32)
    return TransformerXL(
        replace(run.model, vocab_size=VOCAB),
        run.moe,
        seed=1,
        build_moe_layer=moe_layer_builder(layout, rank=1),
    )


def names_by_role(model: TransformerXL, groups: list[Group]) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["role"]: {names[parameter] for parameter in group["params"]} for group in groups}


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = build()
    model.layers[0].moe.router.embedding.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trained) == len(set(grouped))
    assert set(grouped) == set(trained)


def test_groups_are_named_by_what_they_hold() -> None:
    model = build()
    roles = names_by_role(model, parameter_groups(model, 0.1))
    assert set(roles) == ROLES
    assert roles["router_no_decay"] == {f"layers.{i}.moe.router.embedding" for i in (0, 1)}
    assert roles["experts_decay"] == {
        f"layers.{i}.moe.experts.{w}" for i in (0, 1) for w in ("w_in", "w_out")
    }
    assert roles["experts_no_decay"] == {
        f"layers.{i}.moe.experts.{b}" for i in (0, 1) for b in ("b_in", "b_out")
    }
    assert {"embedding.weights.0", "layers.0.attention.qkv.weight"} <= roles["shared_decay"]
    assert {"attention_bias_u", "layers.0.attention_norm.weight"} <= roles["shared_no_decay"]


def test_decay_reaches_matrices_only() -> None:
    for group in parameter_groups(build(), 0.1):
        assert group["weight_decay"] == (0.0 if group["role"].endswith("no_decay") else 0.1)


def test_expert_groups_are_flagged_for_deepspeed_and_named_after_their_process_group() -> None:
    for group in parameter_groups(build(ep_size=2), 0.1):
        spread = group["role"].startswith("experts")
        assert group.get("moe", False) is spread
        assert group["name"] == ("ep_size_2" if spread else group["role"])


def test_experts_at_stage_3_are_parameters_like_others() -> None:
    groups = parameter_groups(build(ep_size=1, stage=3), 0.1)
    assert {group["role"] for group in groups} == ROLES
    assert all(group["name"] == group["role"] and "moe" not in group for group in groups)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_torchs_fused_one(name: str, kind: type[torch.optim.Optimizer]) -> None:
    config = small_run(optimizer={"name": name, "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}).optimizer
    optimizer = build_optimizer(parameter_groups(build(), 0.1), config, {}, CPU)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.8, 0.9), 1e-3, True)
