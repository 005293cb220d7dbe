"""From a user's DeepSpeed config and the run config to one DeepSpeed config without an "auto".

Whatever DeepSpeed would ignore, get wrong or refuse later is refused here, before anything starts,
with the reason and the alternative. docs/deepspeed.md lists all of it.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.config.load import nearest
from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.parallel.device import Device
from megamoe.parallel.ds_keys import check_keys, check_values, require_section

DsConfig = dict[str, Any]

DEFAULT_DS_CONFIG: DsConfig = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}

CPU_BUCKET = 1_000_000
"""Gradients that are reduced together on CPUs. DeepSpeed allocates its bucket anew in every step, by default
for 500 million: fresh pages of memory, which the kernel has to clear. A small bucket is used again."""

_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "fusedadam": "FusedAdam"}


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over ranks.

    Attributes:
        world_size: ranks; all of them are data-parallel.
        ep_size: ranks that share one set of experts.
        micro_batch_size: streams per rank and forward pass.
        accumulation: forward and backward passes per optimizer step.
        zero_stage: 0 to 3.
        dtype: type of the parameters that compute; fp32 masters are kept beside half precision.
    """

    world_size: int
    ep_size: int
    micro_batch_size: int
    accumulation: int
    zero_stage: int
    dtype: torch.dtype

    def rows(self, rank: int) -> range:
        """The streams of the global batch that `rank` reads."""
        n_rows = self.micro_batch_size * self.accumulation
        return range(rank * n_rows, (rank + 1) * n_rows)


def resolve_ds_config(run: RunConfig, ds: Mapping[str, Any], world_size: int, device: Device) -> DsConfig:
    """`ds` with every "auto" decided by `run`, the world and the device; `ds` itself is not changed.

    Raises:
        ConfigError: a key is unknown or unsupported, two values contradict each other, or the
            combination cannot work.
    """
    resolved = copy.deepcopy(dict(ds))
    check_keys(resolved)
    _resolve_zero(run, resolved)
    _resolve_bucket(resolved, device)
    resolve_ep_size(run, world_size, zero_stage(resolved))
    _resolve_precision(resolved, device)
    _resolve_batch(run, resolved, world_size)
    _resolve_equal(resolved, "gradient_clipping", "training.grad_clip", run.training.grad_clip)
    _resolve_optimizer(run, resolved, device)
    _resolve_offload(resolved, device)
    for path in _leftovers(resolved):
        raise ConfigError(f'{path} = "auto": there is no rule for it; give a value or leave it out')
    check_values(resolved)
    return resolved


def layout_of(run: RunConfig, resolved: Mapping[str, Any], world_size: int) -> Layout:
    """The layout that a resolved DeepSpeed config stands for."""
    stage = zero_stage(resolved)
    half = next((name for name in ("bf16", "fp16") if _enabled(resolved, name)), None)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}
    return Layout(
        world_size,
        resolve_ep_size(run, world_size, stage),
        resolved["train_micro_batch_size_per_gpu"],
        resolved["gradient_accumulation_steps"],
        stage,
        dtypes[half],
    )


def zero_stage(ds: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where it has no section."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(ds: Mapping[str, Any]) -> bool:
    """Whether optimizer states are kept in host memory."""
    offload = ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def resolve_ep_size(run: RunConfig, world_size: int, stage: int) -> int:
    """The ranks that share one set of experts; "auto" takes as many as divide both E and the world.

    Raises:
        ConfigError: the experts cannot be spread so over this world, or not at this ZeRO stage.
    """
    asked, n_experts = run.moe.ep_size, run.moe.n_experts
    has_experts = bool(run.moe.layer_indices(run.model.n_layers))
    if asked == "auto":
        ep_size = math.gcd(n_experts, world_size) if has_experts and stage < 3 else 1
    else:
        ep_size = asked
    if ep_size > 1 and not has_experts:
        raise ConfigError(f"moe.ep_size = {ep_size}: no layer has experts (moe.layers); give 1 or auto")
    if world_size % ep_size:
        reason = "there are only" if ep_size > world_size else "does not divide the"
        most = math.gcd(n_experts, world_size)
        possible = ", ".join(str(size) for size in range(1, most + 1) if most % size == 0)
        raise ConfigError(f"moe.ep_size = {ep_size}: {reason} {world_size} ranks; give {possible} or auto")
    if ep_size > 1 and stage == 3:
        raise ConfigError(
            f"moe.ep_size = {ep_size}: DeepSpeed refuses expert-parallel layers at ZeRO stage 3; give"
            " moe.ep_size=1 (stage 3 shards the experts too) or zero_optimization.stage 1 or 2"
        )
    if ep_size > 1 and stage == 0 and run.training.grad_clip > 0:
        raise ConfigError(
            f"training.grad_clip = {run.training.grad_clip}: ZeRO stage 0 clips by a wrong norm when experts"
            f" are spread over ranks (ep_size {ep_size}); use zero_optimization.stage 1, moe.ep_size=1 or"
            " training.grad_clip=0"
        )
    return ep_size


def _enabled(ds: Mapping[str, Any], section: str) -> bool:
    return ds.get(section, {}).get("enabled", False) is True


def _resolve_zero(run: RunConfig, ds: DsConfig) -> None:
    zero = ds.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage == "auto":
        stage = zero["stage"] = 1
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage = {stage!r}: give 0, 1, 2, 3 or auto")
    if stage == 3 or not run.moe.layer_indices(run.model.n_layers):
        return
    for key in ("contiguous_gradients", "reduce_scatter"):
        if stage > 0 and zero.get(key) is False:
            raise ConfigError(
                f"zero_optimization.{key} = false: DeepSpeed needs it for experts at stage {stage}; remove it"
            )


def _resolve_bucket(ds: DsConfig, device: Device) -> None:
    if device.kind == "cpu" and zero_stage(ds) in (1, 2):
        ds["zero_optimization"].setdefault("reduce_bucket_size", CPU_BUCKET)


def _resolve_precision(ds: DsConfig, device: Device) -> None:
    autocast = _enabled(ds, "torch_autocast")
    if ds.get("bf16", {}).get("enabled") == "auto":
        ds["bf16"]["enabled"] = device.bf16 and not _enabled(ds, "fp16") and not autocast
    if ds.get("fp16", {}).get("enabled") == "auto":
        ds["fp16"]["enabled"] = device.fp16 and not _enabled(ds, "bf16") and not autocast
    on = [name for name in ("bf16", "fp16", "torch_autocast") if _enabled(ds, name)]
    if len(on) > 1:
        raise ConfigError(f"{on[0]} and {on[1]} are both enabled: keep one of them")
    if on == ["fp16"] and not device.fp16:
        remedy = "enable bf16 instead" if device.bf16 else "remove the section, which trains in fp32"
        raise ConfigError(f"fp16.enabled = true: this {device.kind} has no float16 arithmetic; {remedy}")
    if on == ["bf16"] and device.kind == "cuda" and not device.bf16:
        raise ConfigError("bf16.enabled = true: this GPU has no bfloat16 arithmetic; enable fp16 instead")
    if autocast and ds["torch_autocast"].get("dtype") not in ("bfloat16", "torch.bfloat16", "bf16"):
        raise ConfigError(
            f"torch_autocast.dtype = {ds['torch_autocast'].get('dtype')!r}: with ZeRO it clips gradients that"
            " are still scaled; give bfloat16"
        )
    if on in (["bf16"], ["fp16"]) and zero_stage(ds) == 0:
        raise ConfigError(
            f"{on[0]}.enabled = true at zero_optimization.stage 0: DeepSpeed takes an empty first step there"
            " and leaves experts out of the gradient norm; use stage 1, which also works on one rank"
        )


def _resolve_batch(run: RunConfig, ds: DsConfig, world_size: int) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks."""
    batch = run.training.batch_size
    if batch % world_size:
        fewer = next(n_ranks for n_ranks in range(world_size, 0, -1) if batch % n_ranks == 0)
        raise ConfigError(
            f"training.batch_size = {batch}: give a multiple of the {world_size} ranks, or start {fewer} of"
            " them"
        )
    _resolve_equal(ds, "train_batch_size", "training.batch_size", batch)
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    if run.training.micro_batch_size != "auto":
        _resolve_equal(ds, keys[0], "training.micro_batch_size", run.training.micro_batch_size)
    micro, accumulation = (None if ds.get(key, "auto") == "auto" else ds[key] for key in keys)
    for key, value in zip(keys, (micro, accumulation), strict=True):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} = {value!r}: give a whole number above 0, or auto")
    if micro is None:
        micro = max(1, batch // (world_size * (accumulation or 1)))
    if accumulation is None:
        accumulation = max(1, batch // (world_size * micro))
    if micro * accumulation * world_size != batch:
        raise ConfigError(
            f"training.batch_size = {batch}: is not {micro} (micro-batch) * {accumulation} (accumulation) *"
            f" {world_size} (ranks) = {micro * accumulation * world_size}; make the two sides equal"
        )
    ds.update(zip(keys, (micro, accumulation), strict=True))


def _resolve_equal(section: DsConfig, key: str, run_name: str, run_value: Any, path: str = "") -> None:
    """Take the run's value where `key` is missing or "auto"; where it is given, it must be the same."""
    value = section.get(key, "auto")
    if value == "auto":
        section[key] = list(run_value) if isinstance(run_value, tuple) else run_value
    elif (tuple(value) if isinstance(value, list) else value) != run_value:
        raise ConfigError(
            f"{path}{key} = {value!r} in the DeepSpeed config, {run_name} = {run_value!r} in the run config:"
            ' make them equal, or write "auto" in the DeepSpeed config'
        )


def _resolve_optimizer(run: RunConfig, ds: DsConfig, device: Device) -> None:
    """The section may name the implementation; what it says about the numbers must be the run's."""
    if "optimizer" not in ds:
        return
    section = ds["optimizer"]
    kind = section.get("type", "auto")
    kind = run.optimizer.name if kind == "auto" else str(kind).lower()
    if kind not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer.type = {section['type']!r}: give Adam, AdamW or FusedAdam (NVIDIA Apex); others are"
            " not tested with experts"
        )
    if kind == "fusedadam" and not device.apex:
        raise ConfigError(
            f"optimizer.type = {section['type']!r}: needs a GPU and NVIDIA Apex built from its source; give"
            " Adam or AdamW, which are fused too"
        )
    section["type"] = _OPTIMIZERS[kind]
    decoupled = run.optimizer.name == "adamw"
    if kind == "adamw" and not decoupled:
        raise ConfigError(
            "optimizer.type = 'AdamW' in the DeepSpeed config, optimizer.name = 'adam' in the run config:"
            ' make them equal, or write "auto" in the DeepSpeed config'
        )
    params = section.setdefault("params", {})
    require_section("optimizer.params", params)
    known = {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam"}
    for key in params:
        if key not in known:
            raise ConfigError(f"optimizer.params.{key}: unknown key, {nearest(key, known)}")
    for key in ("lr", "betas", "eps", "weight_decay"):
        _resolve_equal(params, key, f"optimizer.{key}", getattr(run.optimizer, key), "optimizer.params.")
    _resolve_equal(params, "adam_w_mode", "optimizer.name == 'adamw'", decoupled, "optimizer.params.")


def _resolve_offload(ds: DsConfig, device: Device) -> None:
    zero = ds["zero_optimization"]
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if key not in zero:
            continue
        require_section(f"zero_optimization.{key}", zero[key])
        place = zero[key].get("device", "none")
        if place not in ("cpu", "none"):
            raise ConfigError(f"zero_optimization.{key}.device = {place!r}: give cpu or none")
        if place == "cpu" and zero["stage"] not in stages:
            raise ConfigError(
                f"zero_optimization.{key} at stage {zero['stage']}: does nothing there; use stage {stages[0]}"
            )
    if offloads_optimizer(ds) and ds.get("optimizer", {}).get("type") == "FusedAdam":
        raise ConfigError("optimizer.type = 'FusedAdam': cannot update offloaded states; give Adam or AdamW")
    if offloads_optimizer(ds) and uses_torch_adam(ds, device):
        ds["zero_force_ds_cpu_optimizer"] = False


def uses_torch_adam(ds: Mapping[str, Any], device: Device) -> bool:
    """Whether torch's Adam runs: not Apex's, and not DeepSpeed's for offloaded states, which it compiles."""
    section = ds.get("optimizer", {})
    if section.get("type") == "FusedAdam":
        return False
    asked = section.get("params", {}).get("torch_adam", False)
    return asked or device.kind == "cpu" or not offloads_optimizer(ds)


def _leftovers(value: Any, path: str = "") -> Iterator[str]:
    """Paths whose value is still "auto"."""
    if value == "auto":
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leftovers(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leftovers(item, f"{path}[{index}]")
