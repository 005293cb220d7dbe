"""The engine's numbers that are not tensors: step counters and the state of loss scaling."""

from collections.abc import Mapping
from typing import Any

# What deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler changes while it runs.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_counters(engine: Any) -> dict[str, Any]:
    """The counters of a `deepspeed.DeepSpeedEngine`, by the names that a checkpoint has for them."""
    optimizer = engine.basic_optimizer
    counting = [*optimizer.state.values(), *optimizer.param_groups]  # Apex's Adam counts in its groups
    steps = [int(owner["step"]) for owner in counting if "step" in owner]
    scaler = _dynamic_loss_scaler(engine)
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "optimizer_step": max(steps, default=0),
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER_FIELDS} if scaler else {},
    }


def restore_counters(engine: Any, counters: Mapping[str, Any]) -> None:
    """Make `engine` continue counting and scaling where `counters` were read.

    Adam's own step is restored with its moments, see `megamoe.parallel.fragments`.
    """
    engine.global_steps = counters["global_steps"]
    engine.global_samples = counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]
    # Saving happens between optimizer steps, and accumulation may be another one now.
    engine.micro_steps = counters["global_steps"] * engine.gradient_accumulation_steps()
    scaler = _dynamic_loss_scaler(engine)
    if scaler:
        for name in counters["loss_scaler"].keys() & set(_SCALER_FIELDS):
            setattr(scaler, name, counters["loss_scaler"][name])


def _dynamic_loss_scaler(engine: Any) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
