import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megamoe.config.schema import OptimizerConfig
from megamoe.training.learning_rate import Plateau, learning_rate

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/schedule/schedules.json").read_text())


@pytest.mark.parametrize(
    "golden", GOLDENS["learning_rate"], ids=lambda golden: f"{golden['scheduler']}-{golden['warmup_step']}"
)
def test_rates_of_the_published_trainer(golden):
    optimizer = OptimizerConfig(
        schedule=golden["scheduler"], lr=golden["lr"],
        warmup_steps=golden["warmup_step"], min_lr=golden["eta_min"],
    )  # fmt: skip
    expected = golden["lr_used_at_update"]
    if golden["scheduler"] == "cosine" and golden["warmup_step"]:
        # The published trainer makes its very first update at the full rate, before the ramp starts.
        assert expected[0] == golden["lr"]
        expected = [0.0, *expected[1:]]
    rates = [learning_rate(optimizer, step, golden["max_step"]) for step in range(len(expected))]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", ["cosine", "inv_sqrt", "plateau", "constant"])
def test_warmup_rises_linearly_from_zero(schedule):
    optimizer = OptimizerConfig(schedule=schedule, lr=1e-3, warmup_steps=8)
    rates = [learning_rate(optimizer, step, 100) for step in range(8)]
    assert rates[0] == 0.0
    assert [late - early for early, late in pairwise(rates)] == pytest.approx([rates[1]] * 7)


def test_cosine_stays_at_its_floor_past_the_end():
    optimizer = OptimizerConfig(schedule="cosine", lr=1e-3, min_lr=1e-5)
    assert learning_rate(optimizer, 100, 100) == learning_rate(optimizer, 150, 100) == pytest.approx(1e-5)


@pytest.mark.parametrize(("patience", "decay_rate"), [(0, 0.5), (2, 0.1)])
def test_plateau_falls_as_torch_does(patience, decay_rate):
    optimizer = OptimizerConfig(
        schedule="plateau", lr=1.0, min_lr=0.02, patience=patience, decay_rate=decay_rate
    )  # fmt: skip
    oracle_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        oracle_optimizer, factor=decay_rate, patience=patience, min_lr=0.02
    )
    plateau = Plateau()
    for loss in [3.0, 2.9, 2.95, 2.9, 2.8999, 2.5, 2.6, 2.7, 2.6, 2.55, 2.51, 2.52, 2.4, 2.5, 2.5, 2.5]:
        oracle.step(loss)
        plateau.observe(loss, optimizer)
        expected = oracle_optimizer.param_groups[0]["lr"]
        assert learning_rate(optimizer, 10, 100, plateau) == pytest.approx(expected)
    assert plateau.factor < 1


def test_plateau_takes_a_loss_that_is_not_finite_for_no_improvement():
    optimizer = OptimizerConfig(schedule="plateau", patience=1)
    plateau = Plateau()
    for loss in (math.nan, math.inf):
        plateau.observe(loss, optimizer)
    assert plateau == Plateau(factor=optimizer.decay_rate)


def test_plateau_survives_a_checkpoint():
    optimizer = OptimizerConfig(schedule="plateau", patience=1)
    uncut = Plateau()
    for loss in (2.0, 2.1):
        uncut.observe(loss, optimizer)
    resumed = Plateau(**json.loads(json.dumps(vars(uncut))))
    for plateau in (uncut, resumed):
        plateau.observe(2.2, optimizer)
    assert resumed == uncut
    assert resumed.factor == optimizer.decay_rate
