"""The benchmark of a rank's own work; and that this work does not grow faster than sorting does."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import own_work
from benchmarks.own_work import SECTIONS
from benchmarks.scaling.counting import Counts, count
from benchmarks.scaling.growth import exponent, verdict, wall
from benchmarks.scaling.quantity import MEGAMOE, QUICK, Action, Quantity

TWO = replace(
    QUICK, tokens=(128, 1024), experts=(16, 128), ep_sizes=(16, 128), worlds=(16, 128), engines=(16, 128),
    tensors=(4, 32), checkpoints=(4, 32), sentences=(256, 2048), n_tokens=128, n_experts=16, ep_size=16,
)  # fmt: skip
OURS = [quantity for section in SECTIONS.values() for quantity in section(TWO) if quantity.owner == MEGAMOE]


def counts_of(quantity: Quantity) -> dict[int, Counts]:
    """At each value, once what is done the first time alone is done."""
    counts = {}
    for value in quantity.values:
        with quantity.at(value) as action:
            action()
            counts[value] = count(action)
    return counts


def assert_grows_like_sorting(quantity: Quantity) -> None:
    counts = counts_of(quantity)
    small, large = quantity.values
    most = large * math.log(large) / (small * math.log(small))
    for name in ("calls", "moved", "peak"):
        before, after = getattr(counts[small], name), getattr(counts[large], name)
        assert after <= most * before, f"{name}: {before:,} at {small}, {after:,} at {large}"


@pytest.mark.parametrize("quantity", OURS, ids=lambda q: f"{q.name}, {q.size}")
def test_what_a_rank_does_beside_the_model_grows_no_faster_than_sorting(quantity: Quantity) -> None:
    assert_grows_like_sorting(quantity)


SPREAD = replace(TWO, ep_sizes=(16, 1024), n_tokens=1024)
FLAT = {
    ("all-to-all: plan, gather, bring home", "R"), ("resolve config and layout", "W"),
    ("which part a rank saves", "W"), ("read a rank's batch of the text", "W"),
    ("read a rank's part on half as many ranks", "W"), ("list", "W"),
    ("rank 0: which checkpoints stay", "kept"), ("arithmetic of the plan", "E"),
}  # fmt: skip
"""What other ranks, or checkpoints that stay, should cost a rank next to nothing for."""
HARDLY = [q for section in SECTIONS.values() for q in section(SPREAD) if (q.name, q.size) in FLAT]


@pytest.mark.parametrize("quantity", HARDLY, ids=lambda q: f"{q.name}, {q.size}")
def test_what_does_not_concern_other_ranks_hardly_grows_with_them(quantity: Quantity) -> None:
    (_, before), (_, after) = counts_of(quantity).items()
    for name in ("calls", "moved", "peak"):
        assert getattr(after, name) <= 2 * getattr(before, name), name


def test_all_of_these_are_measured() -> None:
    assert len(HARDLY) == len(FLAT)


@contextmanager
def pairs_of_tensors(size: int) -> Iterator[Action]:
    x = torch.ones(size)
    yield lambda: x[:, None] * x


@contextmanager
def pairs_of_numbers(size: int) -> Iterator[Action]:
    yield lambda: [abs(a - b) for a in range(size) for b in range(size)]


@pytest.mark.parametrize("at", [pairs_of_tensors, pairs_of_numbers])
def test_quadratic_work_is_noticed(at: Action) -> None:
    quantity = Quantity("pairs", "step", "T", (64, 512), at, {})
    with pytest.raises(AssertionError, match=r"(calls|moved|peak): [\d,]+ at 64, [\d,]+ at 512"):
        assert_grows_like_sorting(quantity)


def test_calls_bytes_moved_and_bytes_held_are_counted() -> None:
    x = torch.ones(100_000)

    def work() -> None:
        for _ in range(3):
            y = x[:50_000] * 2  # what was made in the turn before is let go of afterwards
            abs(-1)
        del y

    counts = count(work)
    assert counts.moved == 3 * (200_000 + 200_000)
    assert 0 <= counts.peak - 2 * 200_000 < 50_000  # and some objects
    assert 4 <= counts.calls <= 6  # work, three of abs, and what ends the counting


def test_exponents_verdicts_and_walls() -> None:
    sizes = [2.0**n for n in range(4, 12)]
    for power, word in (
        (0, "constant"),
        (0.5, "less than linear"),
        (1, "linear"),
        (1.25, "n log n"),
        (2, "WORSE"),
    ):
        costs = [3 * size**power for size in sizes]
        assert exponent(sizes, costs) == pytest.approx(power)
        assert verdict(exponent(sizes, costs)) == word
    fixed_and_linear = [1000 + size for size in sizes]
    assert 0.2 < exponent(sizes, fixed_and_linear) < exponent(sizes[4:], fixed_and_linear[4:])
    linear = [3 * size for size in sizes]
    assert wall(sizes, linear, 300.0) == pytest.approx(100)
    assert wall(sizes, linear, 3e6) == pytest.approx(1e6)
    assert wall(sizes, linear, 1.0) == sizes[0]
    assert wall(sizes, [1.0] * len(sizes), 2.0) is None


def test_a_quick_run_writes_every_quantity_with_its_growth_and_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "own-work"
    monkeypatch.setattr(
        "sys.argv", ["own_work", "--quick", "--sections", "checkpoints", "--output", str(output)]
    )
    threads = torch.get_num_threads()
    assert own_work.main() == 0
    torch.set_num_threads(threads)
    result, text = json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    expected = list(SECTIONS["checkpoints"](QUICK))
    assert len(result["quantities"]) == len(expected)
    for quantity, measured in zip(expected, result["quantities"], strict=True):
        assert [point["value"] for point in measured["points"]] == list(quantity.values)
        assert all(point["seconds"] > 0 and point["calls"] > 0 for point in measured["points"])
        assert f"| {quantity.name} (checkpoint; megamoe) | {quantity.size} |" in text
    assert {"machine", "command", "date", "step"} <= result.keys()
    assert result["manifest_bytes_per_piece"] > 50
    assert "## Limits that are met first" in text and "exponents mean nothing" in text


def test_unknown_sections_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["own_work", "--sections", "routing,checkpoint"])
    with pytest.raises(SystemExit):
        own_work.main()
    assert "'checkpoint': choose from routing, start, checkpoints" in capsys.readouterr().err
