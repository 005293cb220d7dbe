"""Merging: who leads, who joins whom, and what becomes of a group."""

import torch

from megamoe.compress.merge import aligned_to, dominant_experts, group_means, groups_of
from megamoe.compress.usage import Usage
from tests.compress.experts import permuted_copies, random_designs


def usage(choices: list[float]) -> Usage:
    return Usage(torch.tensor(choices).double(), torch.ones(len(choices)).double(), None)


def test_the_most_used_experts_of_all_layers_lead_and_one_of_each() -> None:
    used = {1: usage([40, 30, 20, 10]), 3: usage([26, 25, 25, 24])}
    assert {layer: ids.tolist() for layer, ids in dominant_experts(used, 0.5).items()} == {
        1: [0, 1], 3: [0, 1],
    }  # fmt: skip
    uneven = {1: usage([97, 1, 1, 1]), 3: usage([25, 27, 24, 24])}
    assert {layer: ids.tolist() for layer, ids in dominant_experts(uneven, 0.5).items()} == {
        1: [0], 3: [0, 1, 2],
    }  # fmt: skip
    assert [len(ids) for ids in dominant_experts(used, 0.01).values()] == [1, 1]
    assert [len(ids) for ids in dominant_experts(used, 1).values()] == [4, 4]


def test_an_expert_joins_the_leader_that_the_router_scores_like_it() -> None:
    scores_TE = torch.tensor([[1, 0, 3, 0.2], [0, 1, 0.3, 2], [1, 1, 3, 2]], dtype=torch.float64)
    assert groups_of(scores_TE.T @ scores_TE, torch.tensor([0, 1])).tolist() == [0, 1, 0, 1]


def test_permuted_copies_merge_into_themselves() -> None:
    designs = permuted_copies(random_designs(0)[0], 3)
    aligned = aligned_to(designs, torch.tensor([0, 0, 0]))
    assert torch.equal(aligned, designs[0].expand_as(aligned))
    merged = group_means(aligned, torch.zeros(3, dtype=torch.long), torch.tensor([0.5, 0.3, 0.2]).double())
    torch.testing.assert_close(merged[0], designs[0])


def test_groups_are_means_weighted_by_frequency_and_plain_where_nobody_came() -> None:
    values = torch.tensor([[1.0], [5.0], [2.0], [4.0]]).double()
    groups, frequency = torch.tensor([0, 0, 1, 1]), torch.tensor([0.75, 0.25, 0, 0]).double()
    assert group_means(values, groups, frequency).flatten().tolist() == [2.0, 3.0]
