"""A few launches of the soak, see benchmarks/soak.py."""

from pathlib import Path

import pytest

from benchmarks.soak import choose, report, soak

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_run_that_loses_ranks_again_and_again_equals_the_uncut_one(tmp_path: Path) -> None:
    result = soak(tmp_path, seed=0, n_kills=3)
    assert result["problems"] == []
    kills = result["kills"]
    assert {kill["moment"] for kill in kills} == {"training", "writing", "resuming"}
    assert any(kill["torn"] for kill in kills), "no kill met a checkpoint that was being written"
    assert "bit for bit" in report(result | {"date": "", "command": "", "machine": ""})


def test_plans_are_seeded_and_meet_every_moment() -> None:
    plans = choose(1, 20)
    assert plans == choose(1, 20) != choose(2, 20)
    moments = [plan.moment for plan in plans]
    assert [moments.count(moment) for moment in ("writing", "resuming", "training")] == [6, 4, 10]
    assert {plan.rank for plan in plans} == {0, 1}
