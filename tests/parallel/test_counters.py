from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megamoe.checkpoint.state import EngineCounters
from megamoe.parallel.counters import read_counters, restore_counters


def dynamic_scaler():
    return DynamicLossScaler(
        init_scale=2**16, scale_window=2, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )


def engine(scaler, accumulation=1):
    """What of an engine counts."""
    weight = torch.nn.Parameter(torch.zeros(2))
    return SimpleNamespace(
        basic_optimizer=torch.optim.Adam([weight]),
        optimizer=SimpleNamespace(loss_scaler=scaler),
        global_steps=0,
        global_samples=0,
        skipped_steps=0,
        micro_steps=0,
        gradient_accumulation_steps=lambda: accumulation,
    )


def test_dynamic_loss_scaling_continues():
    uncut, resumed = engine(dynamic_scaler()), engine(dynamic_scaler())
    uncut.optimizer.loss_scaler.cur_hysteresis = 1
    uncut.optimizer.loss_scaler.last_overflow_iter = 1
    for _ in range(5):
        uncut.optimizer.loss_scaler.update_scale(False)
    counters = read_counters(uncut)
    assert counters["loss_scaler"]["cur_scale"] == 2**17
    restore_counters(resumed, counters)
    assert vars(resumed.optimizer.loss_scaler) == vars(uncut.optimizer.loss_scaler)


@pytest.mark.parametrize("scaler", [None, LossScaler(1.0)])
def test_precisions_without_dynamic_scaling_have_no_scaler(scaler):
    other = engine(scaler)
    assert read_counters(other)["loss_scaler"] == {}
    restore_counters(other, asdict(EngineCounters(loss_scaler={"cur_scale": 4.0})))
    assert scaler is None or scaler.cur_scale == 1.0


def test_micro_steps_follow_the_accumulation_of_now():
    resumed = engine(None, accumulation=3)
    restore_counters(resumed, asdict(EngineCounters(global_steps=5, global_samples=40, skipped_steps=1)))
    assert (resumed.global_steps, resumed.global_samples, resumed.skipped_steps) == (5, 40, 1)
    assert resumed.micro_steps == 15


def test_adam_counts_beside_the_moments_or_in_the_group():
    counting = engine(None)
    assert read_counters(counting)["optimizer_step"] == 0
    counting.basic_optimizer.param_groups[0]["step"] = 3
    assert read_counters(counting)["optimizer_step"] == 3
    [weight] = counting.basic_optimizer.param_groups[0]["params"]
    counting.basic_optimizer.state[weight]["step"] = torch.tensor(4.0)
    assert read_counters(counting)["optimizer_step"] == 4
