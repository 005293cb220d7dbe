"""The speed benchmark itself; how fast anything is, no test asks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.side_by_side import memory, products, step
from benchmarks.side_by_side.goals import LOWER, Goal, goals
from benchmarks.side_by_side.report import report
from benchmarks.side_by_side.sizes import FULL, Work
from benchmarks.side_by_side.space import peak_bytes, saved_bytes
from benchmarks.side_by_side.timing import Case, DisagreementError, Turns, Way, deviation
from megamoe.parallel.launch import World
from tests.benchmarks.tiny import SMALL, TINY
from tests.ranks import run_ranks


def test_ways_take_turns_and_input_is_made_outside_the_time() -> None:
    calls: list[str] = []
    now = 0.0

    def way(name: str, seconds: float) -> Way:
        def fresh(number: int) -> tuple[int]:
            nonlocal now
            now += 100
            return (number,)

        def run(number: int) -> None:
            nonlocal now
            now += seconds
            calls.append(f"{name}{number}")

        return Way(name, run, fresh)

    seconds = Turns(rounds=2, warmup=1).take([way("a", 1), way("b", 2)], lambda: now)
    assert seconds == {"a": [1, 1], "b": [2, 2]}
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]


def test_what_should_agree_and_does_not_is_refused() -> None:
    assert deviation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1e-9, "peer") == 0
    with pytest.raises(
        DisagreementError, match=r"^peer: deviates by 5\.0e-01 from ours, and 1e-02 are allowed$"
    ):
        deviation(torch.tensor([3.0]), torch.tensor([2.0]), 1e-2, "peer")
    with pytest.raises(DisagreementError):
        deviation(torch.tensor([torch.nan]), torch.tensor([2.0]), 1e-2, "peer")


@pytest.mark.parametrize(
    "direction, ours, verdict",
    [("at least", 2.0, "stretch"), ("at least", 5.0, "met"), ("at least", 7.0, "MISSED"),
     ("at most", 16.0, "MISSED"), ("at most", 6.0, "stretch")],
)  # fmt: skip
def test_goals_are_judged_by_medians(direction: str, ours: float, verdict: str) -> None:
    case = Case("layer", {"k": 2, "T": 5}, {"peer": [9.0, 11.0, 10.0], "ours": [ours], "both": [1.0]})
    settings = {"section": "layer", "settings": {"k": 2}}
    must, stretch = (2.0, 3.0) if direction == "at least" else (1.2, 1.0)
    over, under = ("peer", "ours") if direction != LOWER else ("ours", "peer")
    goal = Goal("g", must, stretch, over=over, under=under, direction=direction, **settings)
    judged = goal.judge([case])
    assert judged["verdict"] == verdict
    assert judged["median"] == pytest.approx(10 / ours if direction != LOWER else ours / 10)
    assert Goal("g", must, stretch, "other", over, under).judge([case])["verdict"] == "not measured"
    less = Goal("g", 1, 1, over="peer", under="ours", less_over="both", less_under="both", **settings)
    assert less.judge([case])["median"] == pytest.approx(9 / (ours - 1))


def test_kept_bytes_count_storages_once_and_what_hangs_on_contexts() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.plan = {"rows": [torch.zeros(1000, dtype=torch.uint8)]}
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0]

    linear = nn.Linear(4, 4, bias=False)
    x = torch.ones(10, 4, requires_grad=True)

    def forward() -> torch.Tensor:
        return Hidden.apply(linear(x).relu()) + linear(x)

    # x by both products, the result of relu, the hidden plan; the weight is a parameter.
    assert saved_bytes(linear, forward) == x.nbytes + x.nbytes + 1000
    assert peak_bytes() > 50e6


def test_bare_products_have_the_work_of_a_step() -> None:
    def flops(shapes: Any) -> float:
        return sum(2 * s.m * s.k * s.n * s.times * s.batch for s in shapes)

    run = FULL.small.run()
    tokens, attention = 2048, 3 * 3 * 2 * 4 * 8 * 512 * 1024 * 64
    assert flops(products.mixture(run, tokens, 8)) == 3 * 2 * 2 * tokens * 8 * 256 * 512
    assert flops(products.attention(run, 4)) == pytest.approx(attention * 0.8125)
    whole = 4 * sum(
        flops(part)
        for part in (
            products.mixture(run, tokens, 8),
            products.attention(run, 4),
            products.projections(run, 4),
        )
    )
    assert flops(products.step(run, 4, 8)) == pytest.approx(whole, rel=0.01)


def test_goals_are_about_what_is_measured() -> None:
    names = [goal.name for goal in goals(FULL)]
    assert len(set(names)) == len(names) == 20


def in_this_process(function: Callable[..., Any], n_ranks: int, *args: Any, timeout: float) -> list[Any]:
    return [function(*args)]


def test_a_run_of_all_sections_gives_every_table_and_judges_every_goal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (step, memory):
        monkeypatch.setattr(module, "run_ranks", in_this_process)
    monkeypatch.setattr(speed, "QUICK", TINY)
    output = tmp_path / "speed"
    monkeypatch.setattr("sys.argv", ["speed", "--quick", "--threads", "1", "--output", str(output)])
    threads = torch.get_num_threads()
    assert speed.main() == 0
    torch.set_num_threads(threads)
    result, text = json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    for heading in (
        *(f"## {section}, dtype {dtype}, threads 1"
          for section in ("layer", "attention") for dtype in ("fp32", "bf16")),
        "## step, threads 1", "## ranks, dtype fp32", "## ranks, dtype bf16",
        "## evaluation, threads 1", "## engine, threads 1", "## memory of a step",
        "## memory kept by the layer, dtype fp32",
        "## memory kept by the layer, dtype bf16",
    ):  # fmt: skip
        assert heading in text
    assert {goal["verdict"] for goal in result["goals"]} <= {"stretch", "met", "MISSED"}
    assert all(
        value > 0 for case in result["cases"] for values in case["values"].values() for value in values
    )
    assert {"machine", "goals", "command", "date"} <= result.keys()
    assert result["machine"]["versions"]["deepspeed"]
    assert result["quick"] and "no judgement on the goals" in text


@pytest.mark.distributed
def test_steps_are_timed_on_two_expert_parallel_ranks() -> None:
    work = Work(SMALL.name, SMALL.overrides, batch=2, top_k=SMALL.top_k)
    for seconds in run_ranks(step.seconds_of_steps, 2, work, "bf16", Turns(rounds=2, warmup=1)):
        assert len(seconds) == 2 and min(seconds) > 0


def test_unknown_sections_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["speed", "--sections", "layer,speeed"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "speeed: choose from layer, attention, step, evaluation, engine, memory" in capsys.readouterr().err


def test_without_transformers_that_peer_is_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.mixtral.modeling_mixtral", None)
    said: list[str] = []
    result, cases = speed.speed(TINY, ["layer"], [1], said.append)
    (line,) = (line for line in said if "left out" in line)
    assert line.startswith("transformers is left out: ") and "\n" not in line
    assert line in report(result, cases)
    assert not [way for case in cases for way in case.values if "transformers" in way]
    assert [goal["verdict"] for goal in result["goals"] if "transformers" in goal["goal"]] == ["not measured"]
