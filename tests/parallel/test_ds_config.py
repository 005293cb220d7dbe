"""Every "auto" is decided, every contradiction and everything that cannot work is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.config.load import from_dict
from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import (
    CPU_BUCKET,
    DEFAULT_DS_CONFIG,
    Layout,
    layout_of,
    resolve_ds_config,
    uses_torch_adam,
)
from megamoe.parallel.ds_keys import REFUSED_KEYS

PLAIN_CPU = Device("cpu", bf16=False, fp16=False)
BF16_CPU = Device("cpu", bf16=True, fp16=False)
OLD_GPU = Device("cuda", bf16=False, fp16=True)
GPU = Device("cuda", bf16=True, fp16=True, apex=True)
FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def run_config(**sections: dict[str, Any]) -> RunConfig:
    return from_dict({"training": {"batch_size": 16, "grad_clip": 0.25}} | sections)


def resolve(
    ds: dict[str, Any], run: RunConfig | None = None, world_size: int = 2, device: Device = BF16_CPU
) -> dict[str, Any]:
    return resolve_ds_config(run or run_config(), ds, world_size, device)


ZERO1 = {"zero_optimization": {"stage": 1}}


def test_auto_and_missing_numbers_come_from_the_run() -> None:
    given = {"train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": "auto"}}
    resolved = resolve(given)
    assert resolved == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.25,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": CPU_BUCKET},
    }
    assert given["train_batch_size"] == "auto"
    assert json.loads(json.dumps(resolved)) == resolved


@pytest.mark.parametrize(
    ("zero", "device", "bucket"),
    [
        ({"stage": 1}, BF16_CPU, CPU_BUCKET),
        ({"stage": 2}, BF16_CPU, CPU_BUCKET),
        ({"stage": 1, "reduce_bucket_size": 7}, BF16_CPU, 7),
        ({"stage": 1}, GPU, None),
        ({"stage": 3}, BF16_CPU, None),
    ],
)
def test_buckets_are_small_where_memory_is_slow_to_get(
    zero: dict[str, Any], device: Device, bucket: int | None
) -> None:
    resolved = resolve({"zero_optimization": zero}, run_config(moe={"ep_size": 1}), device=device)
    assert resolved["zero_optimization"].get("reduce_bucket_size") == bucket


@pytest.mark.parametrize(
    ("run_micro", "ds", "micro", "accumulation"),
    [
        ("auto", {}, 8, 1),
        (2, {}, 2, 4),
        ("auto", {"train_micro_batch_size_per_gpu": 4}, 4, 2),
        ("auto", {"gradient_accumulation_steps": 4}, 2, 4),
        (2, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 2, 4),
    ],
)
def test_micro_batch_and_accumulation_follow_from_one_another(
    run_micro: Any, ds: dict[str, Any], micro: int, accumulation: int
) -> None:
    run = run_config(training={"batch_size": 16, "micro_batch_size": run_micro})
    resolved = resolve({**ds, **ZERO1}, run)
    assert resolved["train_micro_batch_size_per_gpu"] == micro
    assert resolved["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize(
    ("device", "bf16", "fp16", "expected"),
    [
        (PLAIN_CPU, "auto", "auto", torch.float32),
        (BF16_CPU, "auto", "auto", torch.bfloat16),
        (OLD_GPU, "auto", "auto", torch.float16),
        (GPU, "auto", "auto", torch.bfloat16),
        (GPU, "auto", True, torch.float16),
        (GPU, "auto", False, torch.bfloat16),
        (GPU, False, "auto", torch.float16),
        (PLAIN_CPU, True, "auto", torch.bfloat16),
    ],
)
def test_automatic_precision_is_what_the_device_has(
    device: Device, bf16: Any, fp16: Any, expected: torch.dtype
) -> None:
    run = run_config()
    resolved = resolve({"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}, **ZERO1}, run, device=device)
    assert layout_of(run, resolved, 2).dtype is expected


@pytest.mark.parametrize(
    ("moe", "world_size", "stage", "expected"),
    [
        ({"n_experts": 16}, 1, 1, 1),
        ({"n_experts": 16}, 2, 1, 2),
        ({"n_experts": 16}, 12, 2, 4),
        ({"n_experts": 6}, 4, 1, 2),
        ({"n_experts": 16}, 64, 1, 16),
        ({"n_experts": 16}, 8, 3, 1),
        ({"n_experts": 16, "ep_size": 2}, 8, 1, 2),
        ({"n_experts": 16, "layers": "none"}, 8, 1, 1),
    ],
)
def test_automatic_ep_size_is_the_largest_that_divides(
    moe: dict[str, Any], world_size: int, stage: int, expected: int
) -> None:
    run = run_config(moe={"top_k": 2, **moe}, training={"batch_size": 192})
    resolved = resolve({"zero_optimization": {"stage": stage}}, run, world_size)
    assert layout_of(run, resolved, world_size).ep_size == expected


def test_rows_of_all_ranks_are_the_global_batch() -> None:
    layout = Layout(4, 2, 3, 2, 1, torch.float32)
    assert [row for rank in range(4) for row in layout.rows(rank)] == list(range(24))


def test_optimizer_section_takes_its_numbers_from_the_run() -> None:
    run = run_config(optimizer={"name": "adamw", "lr": 0.1, "weight_decay": 0.01})
    resolved = resolve(
        {"optimizer": {"type": "auto", "params": {"lr": "auto", "torch_adam": True}}, **ZERO1}, run
    )
    assert resolved["optimizer"] == {
        "type": "AdamW",
        "params": {
            "lr": 0.1, "torch_adam": True, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
            "adam_w_mode": True,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ds", "device", "expected"),
    [
        ({}, BF16_CPU, True),
        ({}, GPU, True),
        ({"offload_optimizer": {"device": "cpu"}}, BF16_CPU, True),
        ({"offload_optimizer": {"device": "cpu"}}, GPU, False),
        ({"offload_optimizer": {"device": "none"}}, GPU, True),
    ],
)
def test_only_states_offloaded_from_a_gpu_need_a_compiled_adam(
    ds: dict[str, Any], device: Device, expected: bool
) -> None:
    resolved = resolve({"zero_optimization": {"stage": 1, **ds}}, device=device)
    assert uses_torch_adam(resolved, device) is expected
    offloaded_torch = expected and "offload_optimizer" in ds and ds["offload_optimizer"]["device"] == "cpu"
    assert resolved.get("zero_force_ds_cpu_optimizer", True) is not offloaded_torch


@pytest.mark.parametrize(
    ("sections", "ds", "message"),
    [
        # keys
        ({}, {"amp": {"enabled": False}}, "amp in the DeepSpeed config: DeepSpeed has removed Apex AMP"),
        ({}, {"amp": None}, "amp in the DeepSpeed config: "),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "scheduler in the DeepSpeed config: the learning rate"),
        (
            {},
            {"activation_checkpointing": {}},
            "activation_checkpointing in the DeepSpeed config: set training.",
        ),
        ({}, {"expert_parallel": {}}, "expert_parallel in the DeepSpeed config: AutoEP"),
        ({}, {"elasticity": {}}, "elasticity in the DeepSpeed config: DeepSpeed has removed it"),
        (
            {},
            {"gradient_cliping": 1.0},
            "gradient_cliping in the DeepSpeed config: unknown key, did you mean 'gradient_clipping'?",
        ),
        (
            {},
            {"zero_optimization": {"stge": 1}},
            "zero_optimization.stge in the DeepSpeed config: unknown key, did you mean 'stage'?",
        ),
        (
            {},
            {"bf16": {"enable": True}},
            "bf16.enable in the DeepSpeed config: unknown key, did you mean 'enabled'?",
        ),
        ({}, {"bf16": True}, "bf16 = True: is a section of the DeepSpeed config"),
        ({}, {"bf16": {"enabled": "yes"}}, "bf16.enabled = 'yes': give true, false or \"auto\""),
        (
            {},
            {"data_types": {"buffer_dtype": "bf16"}},
            "data_types.buffer_dtype in the DeepSpeed config: frozen",
        ),
        ({}, {"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads in"),
        (
            {},
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size = "auto": there is no rule for it',
        ),
        # batch
        (
            {"training": {"batch_size": 15}},
            ZERO1,
            "training.batch_size = 15: give a multiple of the 2 ranks, or start 1 of them",
        ),
        (
            {"training": {"batch_size": 16, "micro_batch_size": 3}},
            ZERO1,
            "training.batch_size = 16: is not 3 (micro-batch) * 2 (accumulation) * 2 (ranks) = 12",
        ),
        (
            {},
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, **ZERO1},
            "training.batch_size = 16: is not 4 (micro-batch) * 3 (accumulation) * 2 (ranks) = 24",
        ),
        (
            {},
            {"train_batch_size": 64, **ZERO1},
            "train_batch_size = 64 in the DeepSpeed config, training.batch_size = 16 in the run config",
        ),
        (
            {"training": {"batch_size": 16, "micro_batch_size": 4}},
            {"train_micro_batch_size_per_gpu": 8, **ZERO1},
            "train_micro_batch_size_per_gpu = 8 in the DeepSpeed config, training.micro_batch_size = 4",
        ),
        ({}, {"gradient_accumulation_steps": 0, **ZERO1}, "gradient_accumulation_steps = 0: give a whole"),
        (
            {},
            {"gradient_clipping": 1.0, **ZERO1},
            "gradient_clipping = 1.0 in the DeepSpeed config, training.grad_clip = 0.25 in the run config",
        ),
        # precision
        (
            {},
            {"fp16": {"enabled": True}, **ZERO1},
            "fp16.enabled = true: this cpu has no float16 arithmetic; enable bf16 instead",
        ),
        (
            {},
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}, **ZERO1},
            "bf16 and fp16 are both enabled: keep one of them",
        ),
        (
            {},
            {"torch_autocast": {"enabled": True, "dtype": "float16"}, **ZERO1},
            "torch_autocast.dtype = 'float16': with ZeRO it clips gradients that are still scaled",
        ),
        ({}, {"torch_autocast": {"enabled": True}, **ZERO1}, "torch_autocast.dtype = None: with ZeRO"),
        (
            {"moe": {"ep_size": 1}},
            {"bf16": {"enabled": True}},
            "bf16.enabled = true at zero_optimization.stage 0: DeepSpeed takes an empty first step there",
        ),
        # experts and ZeRO
        (
            {"moe": {"ep_size": 2}},
            {"zero_optimization": {"stage": 3}},
            "moe.ep_size = 2: DeepSpeed refuses expert-parallel layers at ZeRO stage 3; give moe.ep_size=1",
        ),
        (
            {},
            {"zero_optimization": {"stage": 0}},
            "training.grad_clip = 0.25: ZeRO stage 0 clips by a wrong norm when experts are spread over ranks"
            " (ep_size 2); use zero_optimization.stage 1",
        ),
        ({"moe": {"ep_size": 4}}, ZERO1, "moe.ep_size = 4: there are only 2 ranks; give 1, 2 or auto"),
        (
            {"moe": {"ep_size": 2, "layers": "none"}},
            ZERO1,
            "moe.ep_size = 2: no layer has experts (moe.layers)",
        ),
        ({}, {"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4: give 0, 1, 2, 3 or auto"),
        (
            {},
            {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            "zero_optimization.contiguous_gradients = false: DeepSpeed needs it for experts at stage 2",
        ),
        (
            {},
            {"zero_optimization": {"stage": 1, "contiguous_gradients": False}},
            "zero_optimization.contiguous_gradients = false: DeepSpeed needs it for experts at stage 1",
        ),
        (
            {},
            {"zero_optimization": {"stage": 1, "reduce_scatter": False}},
            "zero_optimization.reduce_scatter = false: DeepSpeed needs it for experts at stage 1",
        ),
        (
            {},
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param at stage 1: does nothing there; use stage 3",
        ),
        (
            {"moe": {"ep_size": 1}},
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer at stage 0: does nothing there; use stage 1",
        ),
        (
            {},
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device = 'nvme': give cpu or none",
        ),
        # optimizer
        (
            {},
            {"optimizer": {"type": "Muon"}, **ZERO1},
            "optimizer.type = 'Muon': give Adam, AdamW or FusedAdam",
        ),
        (
            {},
            {"optimizer": {"type": "OneBitAdam"}, **ZERO1},
            "optimizer.type = 'OneBitAdam': give Adam, AdamW",
        ),
        (
            {},
            {"optimizer": {"type": "FusedAdam"}, **ZERO1},
            "optimizer.type = 'FusedAdam': needs a GPU and NVIDIA Apex built from its source",
        ),
        (
            {},
            {"optimizer": {"type": "AdamW"}, **ZERO1},
            "optimizer.type = 'AdamW' in the DeepSpeed config, optimizer.name = 'adam' in the run config",
        ),
        (
            {},
            {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}, **ZERO1},
            "optimizer.params.lr = 1.0 in the DeepSpeed config, optimizer.lr = 0.00025 in the run config",
        ),
        (
            {},
            {"optimizer": {"type": "Adam", "params": {"learning_rate": 1.0}}, **ZERO1},
            "optimizer.params.learning_rate: unknown key, choose from adam_w_mode, betas",
        ),
        (
            {},
            {"optimizer": {"type": "Adam", "params": []}, **ZERO1},
            "optimizer.params = []: is a section of the DeepSpeed config",
        ),
        (
            {},
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}},
            "zero_optimization.reduce_bucket_size = 'many': Input should be a valid integer",
        ),
        (
            {},
            {"bf16": {"enabled": True, "immediate_grad_update": 7}, **ZERO1},
            "bf16.immediate_grad_update = 7: Input should be a valid boolean",
        ),
    ],
)
def test_refused(sections: dict[str, Any], ds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as refusal:
        resolve(ds, run_config(**sections))
    assert "\n" not in str(refusal.value)


def test_ep_size_must_divide_experts_and_ranks() -> None:
    with pytest.raises(ConfigError, match=r"^moe.ep_size = 3: give a divisor of moe.n_experts = 16"):
        run_config(moe={"ep_size": 3})
    run = run_config(moe={"ep_size": 4}, training={"batch_size": 36})
    with pytest.raises(ConfigError, match=r"^moe.ep_size = 4: does not divide the 6 ranks"):
        resolve(ZERO1, run, world_size=6)


def test_a_gpu_without_bf16_and_offloaded_apex_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^bf16.enabled = true: this GPU has no bfloat16 arithmetic"):
        resolve({"bf16": {"enabled": True}, **ZERO1}, device=OLD_GPU)
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"^optimizer.type = 'FusedAdam': cannot update offloaded states"):
        resolve({"optimizer": {"type": "FusedAdam"}, **offload}, device=GPU)


@pytest.mark.parametrize("stage", [0, 1])
def test_stage_0_may_clip_where_every_rank_has_all_experts(stage: int) -> None:
    run = run_config(moe={"ep_size": 1})
    assert resolve({"zero_optimization": {"stage": stage}}, run)["gradient_clipping"] == 0.25


def test_a_section_that_is_missing_means_stage_0_as_in_deepspeed() -> None:
    assert resolve({}, run_config(moe={"ep_size": 1}))["zero_optimization"]["stage"] == 0


def test_the_default_is_the_automatic_file() -> None:
    file = Path(__file__).parents[2] / "ds_configs" / "zero1_auto.json"
    assert resolve(DEFAULT_DS_CONFIG) == resolve(json.loads(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_resolves_where_the_hardware_has_it(file: Path) -> None:
    ds = json.loads(file.read_text())
    for world_size in (1, 8):
        clip = 0.0 if ds["zero_optimization"]["stage"] == 0 else 1.0
        run = run_config(training={"batch_size": 16, "grad_clip": clip})
        resolved = resolve(ds, run, world_size, GPU)
        assert "auto" not in json.dumps(resolved).replace("torch_autocast", "")


def test_the_documentation_lists_every_file_and_every_refused_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text()
    assert len(FILES) > 10
    missing = [file.name for file in FILES if f"`{file.name}`" not in text]
    missing += [key for key in REFUSED_KEYS if key.rpartition(".")[2] not in text]
    assert not missing


def test_detection_gives_what_this_machine_computes() -> None:
    device = Device.detect()
    assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    if device.fp16:
        half = torch.ones(2, 2, dtype=torch.float16, device=device.kind)
        assert (half @ half).tolist() == [[2.0, 2.0], [2.0, 2.0]]
