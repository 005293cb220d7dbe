"""Which keys a DeepSpeed config may have here: DeepSpeed ignores unknown ones in silence or fails late."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from megamoe.config.load import nearest
from megamoe.errors import ConfigError

SUPPORTED_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types",
    "optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc",
    "comms_logger", "flops_profiler", "timers",
})  # fmt: skip

REFUSED_KEYS = {
    "amp": "DeepSpeed has removed Apex AMP; use bf16 or fp16, and remove the section, even a disabled one",
    "scheduler": "the learning rate follows optimizer.schedule of the run config; remove the section",
    "activation_checkpointing": "set training.activation_checkpointing in the run config instead",
    "expert_parallel": "AutoEP replaces layers of other models; set moe.ep_size in the run config instead",
    "use_data_before_expert_parallelism": "expert-parallel groups are ranks in a row here; remove the key",
    "checkpoint": "checkpoints are megamoe's own; set checkpoint.* in the run config instead",
    "data_efficiency": "data come from megamoe's streams; set data.* in the run config instead",
    "tensor_parallel": "experts and data are parallel here, not tensors; remove the section",
    "pipeline": "the model is no pipeline; remove the section",
    "gradient_allreduce_op": "gradients are means over ranks here; remove the key",
    "managed_gradient_accumulation": "DeepSpeed counts micro-batches here; remove the key",
    "elasticity": "DeepSpeed has removed it; a checkpoint resumes on another number of ranks as it is",
    "sparse_attention": "DeepSpeed has removed it; remove the section",
    "compression_training": "DeepSpeed has removed it; remove the section",
    "curriculum_learning": "DeepSpeed has removed it; remove the section",
    "zero_optimization.cpu_offload": "write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "write offload_param: {device: cpu}",
    "zero_optimization.compute_grad_norm": "the norm is logged and guards against bad steps; remove the key",
    "zero_optimization.zenflow": "not tested with experts; remove the section",
    "bf16.bf16_master_weights_and_grads": "checkpoints hold fp32 master weights; remove the key",
    "bf16.bf16_optimizer_states": "checkpoints hold fp32 moments; remove the key",
    "bf16.check_grad_overflow": "steps on gradients that are not finite are skipped always; remove the key",
    "fp16.fp16_master_weights_and_grads": "checkpoints hold fp32 master weights; remove the key",
    "data_types.buffer_dtype": "frozen hypernetworks are fp32 buffers; remove the key",
    "data_types.param_dtype": "bf16 or fp16 decide it; remove the key",
}


def check_keys(ds: Mapping[str, Any]) -> None:
    """Refuse keys, at top level and in sections, that would be ignored or cannot work.

    Raises:
        ConfigError: with the reason, or the nearest known key.
    """
    _check(ds, SUPPORTED_KEYS, "")
    for name, known in _section_keys().items():
        if name in ds:
            section = require_section(name, ds[name])
            _check(section, known, f"{name}.")
            if section.get("enabled", False) not in (True, False, "auto"):
                raise ConfigError(f'{name}.enabled = {section["enabled"]!r}: give true, false or "auto"')


def check_values(ds: Mapping[str, Any]) -> None:
    """Refuse values that DeepSpeed's own models of its sections do not take; `ds` holds no "auto" any more.

    Raises:
        ConfigError: the first such value.
    """
    for name, model in _section_models().items():
        try:
            model(**ds.get(name, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            path = ".".join(map(str, (name, *problem["loc"])))
            raise ConfigError(f"{path} = {problem['input']!r}: {problem['msg']}") from None


def require_section(name: str, value: object) -> Mapping[str, Any]:
    """`value`, which must be a table.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} = {value!r}: is a section of the DeepSpeed config, write {{...}}")
    return value


def _check(section: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    for key in section:
        name = f"{path}{key}"
        if name in REFUSED_KEYS:
            raise ConfigError(f"{name} in the DeepSpeed config: {REFUSED_KEYS[name]}")
        if key not in known:
            raise ConfigError(f"{name} in the DeepSpeed config: unknown key, {nearest(key, known)}")


def _section_keys() -> dict[str, Iterable[str]]:
    """What sections may hold; ZeRO's and the precisions' keys are as many as the installed DeepSpeed has."""
    known: dict[str, Iterable[str]] = {
        name: {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
        for name, model in _section_models().items()
    }
    return known | {
        "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
        "data_types": ("grad_accum_dtype",),
        "optimizer": ("type", "params"),
    }


def _section_models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's models of its sections."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
    }  # fmt: skip
