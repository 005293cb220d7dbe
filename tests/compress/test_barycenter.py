"""The search for the centre of a layer's experts."""

from itertools import pairwise, permutations

import pytest
import torch

from megamoe.compress.barycenter import alternate, barycenter, reordered
from megamoe.convert.alignment import align
from tests.compress.experts import E, F, permuted_copies, random_designs


def energy(experts_EFC: torch.Tensor, centre_FC: torch.Tensor) -> float:
    return float((experts_EFC - centre_FC).square().sum()) / len(experts_EFC)


def test_three_units_by_hand() -> None:
    experts = torch.tensor([[[0.0], [1.0], [2.0]], [[2.1], [0.1], [1.1]]], dtype=torch.float64)
    found = alternate(experts, experts[0])
    assert found.orders_EF.tolist() == [[0, 1, 2], [1, 2, 0]]
    torch.testing.assert_close(found.centre_FC.flatten().tolist(), [0.05, 1.05, 2.05])
    assert found.objectives[-1] == pytest.approx(3 * 0.05**2)


def test_alignment_is_the_best_of_all_permutations() -> None:
    for seed in range(5):
        rows, target = random_designs(seed, (2, 5, 3))
        order = align(rows, target)
        assert sorted(order.tolist()) == list(range(5))
        least = min(energy(rows[list(p)][None], target) for p in permutations(range(5)))
        assert energy(rows[order][None], target) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("start", range(E))
def test_planted_copies_have_no_residual_from_any_of_them(start: int) -> None:
    experts = permuted_copies(random_designs(0)[0], E)
    found = alternate(experts, experts[start])
    torch.testing.assert_close(reordered(experts, found.orders_EF), found.centre_FC.expand_as(experts))
    assert found.objectives[-1] < 1e-24


@pytest.mark.parametrize("seed", range(4))
def test_the_objective_never_rises_and_ends_at_a_fixed_point(seed: int) -> None:
    experts = random_designs(seed)
    for start in (experts.mean(0), *experts):
        found = alternate(experts, start)
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(found.objectives))
        aligned = reordered(experts, found.orders_EF)
        torch.testing.assert_close(found.centre_FC, aligned.mean(0))
        assert found.objectives[-1] == pytest.approx(energy(aligned, found.centre_FC))
        for order_F in found.orders_EF:
            assert sorted(order_F.tolist()) == list(range(F))


def test_it_is_never_worse_than_the_plain_mean_and_more_starts_never_hurt() -> None:
    experts = random_designs(1)
    plain = energy(experts, experts.mean(0))
    objectives = [barycenter(experts, n_starts).objectives[-1] for n_starts in range(1, E + 2)]
    assert objectives[0] < plain
    assert all(later <= earlier for earlier, later in pairwise(objectives))


def test_the_order_of_an_experts_units_does_not_matter() -> None:
    experts = random_designs(2)
    shuffled = experts.clone()
    shuffled[3] = experts[3][torch.randperm(F, generator=torch.Generator().manual_seed(7))]
    ours, theirs = alternate(experts, experts[0]), alternate(shuffled, experts[0])
    assert ours.objectives == pytest.approx(theirs.objectives)
    torch.testing.assert_close(ours.centre_FC, theirs.centre_FC)
    torch.testing.assert_close(
        reordered(experts, ours.orders_EF), reordered(shuffled, theirs.orders_EF), rtol=0, atol=0
    )


def test_the_same_experts_give_the_same_barycenter() -> None:
    experts = random_designs(3)
    a, b = barycenter(experts, 3), barycenter(experts.clone(), 3)
    assert torch.equal(a.centre_FC, b.centre_FC) and torch.equal(a.orders_EF, b.orders_EF)
