import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.config.schema import TopKScheduleConfig
from megamoe.moe.schedules import top_k_at

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/schedule/schedules.json").read_text())["top_k"]


@pytest.mark.parametrize("curve", GOLDEN, ids=lambda c: f"{c['mode']}-{c['overall_steps']}")
def test_equals_the_published_curves(curve):
    config = TopKScheduleConfig(
        mode=curve["mode"], min_k=curve["k_min"], max_k=curve["k_max"], steps=curve["overall_steps"]
    )
    known = {step: k for step, k in zip(curve["step"], curve["k"], strict=True) if k is not None}
    assert {step: top_k_at(config, 2, step, 10**9) for step in known} == known


def test_breakpoints_of_the_published_run():
    config = TopKScheduleConfig(mode="linear_increase", min_k=8, max_k=16)
    at = {step: top_k_at(config, 2, step, 400_000) for step in (0, 25_000, 25_001, 75_000, 375_000, 400_000)}
    assert at == {0: 8, 25_000: 8, 25_001: 9, 75_000: 10, 375_000: 16, 400_000: 16}


def test_constant_is_top_k():
    assert [top_k_at(TopKScheduleConfig(), 3, step, 10) for step in (0, 9, 99)] == [3, 3, 3]


def test_own_steps_go_before_the_length_of_the_run():
    config = TopKScheduleConfig(mode="linear_increase", min_k=1, max_k=5, steps=4)
    assert [top_k_at(config, 2, step, 400) for step in range(6)] == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("mode, last", [("multi_step_increase", 16), ("multi_step_decrease", 1)])
def test_ladders_stay_on_their_last_rung(mode, last):
    config = TopKScheduleConfig(mode=mode, min_k=1, max_k=16)
    assert {top_k_at(config, 2, step, 100) for step in (99, 100, 101, 10_000)} == {last}


@pytest.mark.parametrize("steps", [1, 20, 299, 300, 301])
def test_exponential_curve_keeps_its_shape_in_short_runs(steps):
    config = TopKScheduleConfig(mode="exp_increase", min_k=8, max_k=16)
    ks = [top_k_at(config, 2, step, steps) for step in range(steps + 1)]
    assert ks == sorted(ks)
    assert (ks[0], ks[-1]) == (8, 16)


def test_planning_a_schedule_needs_no_torch():
    code = "import sys, megamoe.moe.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
