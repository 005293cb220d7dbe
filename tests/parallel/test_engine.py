"""Engines on 1, 2 and 4 ranks give the numbers of plain torch in one process."""

from typing import Any

import pytest

from tests.parallel.parity import Case, behaviour, cases, parity
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def deviations_of() -> Any:
    """Deviations by case, the largest over ranks, for a world size that is run once."""
    known: dict[int, dict[str, dict[str, float]]] = {}

    def deviations(world_size: int) -> dict[str, dict[str, float]]:
        if world_size not in known:
            ranks = run_ranks(parity, world_size, world_size)
            known[world_size] = {
                case: {what: max(rank[case][what] for rank in ranks) for what in ranks[0][case]}
                for case in ranks[0]
            }
        return known[world_size]

    return deviations


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(world_size, case) for world_size in WORLDS for case in cases(world_size)],
    ids=lambda value: f"world{value}" if isinstance(value, int) else str(value),
)
def test_equals_plain_torch_in_one_process(deviations_of: Any, world_size: int, case: Case) -> None:
    deviations = deviations_of(world_size)[str(case)]
    assert all(deviation < 1e-5 for deviation in deviations.values()), deviations


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return run_ranks(behaviour, 2)


def test_bf16_equals_plain_bf16_within_its_precision(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        bf16 = rank["bf16"]
        assert bf16["first_loss"][0] == pytest.approx(bf16["first_loss"][1], rel=1e-3)
        assert bf16["first_norm"][0] == pytest.approx(bf16["first_norm"][1], rel=1e-2)
        assert bf16["first_gradient"] < 0.02


def test_bf16_is_as_exact_wherever_experts_are(facts: list[dict[str, Any]]) -> None:
    """The sums of two ranks' experts are rounded one by one, so the numbers differ by that."""
    for rank in facts:
        bf16 = rank["bf16"]
        assert bf16["rounding_spread"] < 1.5 * bf16["rounding_whole"], bf16
        spread, whole = bf16["losses"]
        assert spread == pytest.approx(whole, rel=2e-3)


def test_hypernetwork_stays_fp32_and_untrained_under_bf16(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert rank["bf16"]["parameters"] == {"torch.bfloat16"}
        assert rank["bf16"]["buffers"] == {"torch.float32"}
        assert rank["bf16"]["n_buffers"] > 0
        assert rank["bf16"]["buffers_trained"] == []


@pytest.mark.parametrize("stage", range(4))
def test_gradients_that_are_not_finite_on_one_rank_skip_the_step_on_all(
    facts: list[dict[str, Any]], stage: int
) -> None:
    for rank in facts:
        skips = rank["skips"][stage]
        assert skips["skipped"] == [False, True]
        assert skips["norms"][1] == float("inf")
        assert skips["unchanged"]
        assert skips["counted"] == (2, 1)


def test_ranks_with_different_hypernetworks_are_refused(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert rank["buffers"].startswith("DistributedError: ranks [1]: their frozen buffers differ")


def test_world_averages_and_gathers(facts: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(facts):
        collectives = rank["collectives"]
        assert collectives["mean"] == [1.5, 3.0]
        assert collectives["sum"] == [3.0, 6.0]
        assert collectives["own_value_kept"]
        assert not collectives["needs_grad"]
        assert collectives["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert collectives["gathered_on_main"] == ([{"rank": 0}, {"rank": 1}] if number == 0 else [])
        assert collectives["is_main"] == (number == 0)


def test_learning_rate_reaches_every_group(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert rank["learning_rate"]["unchanged"]


def test_exactly_the_experts_are_marked_for_deepspeed(facts: list[dict[str, Any]]) -> None:
    leaves = ("b_in", "b_out", "w_in", "w_out")
    expected = [f"layers.{layer}.moe.experts.{leaf}" for layer in (0, 1) for leaf in leaves]
    assert facts[0]["learning_rate"]["experts_marked"] == expected


def test_evaluation_is_deterministic_and_training_is_not(facts: list[dict[str, Any]]) -> None:
    dropout = facts[0]["dropout"]
    assert dropout["training"][0] != dropout["training"][1]
    assert dropout["evaluation"][0] == dropout["evaluation"][1]
