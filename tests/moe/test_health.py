import math

import pytest
import torch

from megamoe.moe.health import Churn, routing_health
from megamoe.moe.routing import Routing
from megamoe.moe.selection import top_k_softmax


def routed(ids, logits_TE=None, wanted_TK=None):
    ids_TK = torch.tensor(ids)
    return Routing(ids_TK, (ids_TK >= 0).float(), logits_TE, wanted_TK=wanted_TK)


def test_balanced_routing():
    (layer,) = routing_health([routed([[0, 1], [2, 3], [0, 1], [2, 3]], torch.zeros(4, 4))], 4)
    assert layer.load == (0.25, 0.25, 0.25, 0.25)
    assert (layer.max_over_mean, layer.variation, layer.dead) == (1, 0, 0)
    assert layer.load_entropy == pytest.approx(math.log(4))
    assert layer.router_entropy == pytest.approx(math.log(4))
    assert (layer.drop_rate, layer.unrouted) == (0, 0)


def test_collapsed_routing():
    logits_TE = torch.tensor([90.0, 0, 0, 0]).expand(6, 4)
    (layer,) = routing_health([routed([[0]] * 6, logits_TE)], 4)
    assert layer.load == (1, 0, 0, 0)
    assert (layer.max_over_mean, layer.dead) == (4, 3)
    assert layer.variation == pytest.approx(math.sqrt(3))
    assert layer.load_entropy == pytest.approx(0, abs=1e-9)
    assert layer.router_entropy == pytest.approx(0, abs=1e-6)


def test_an_uneven_load_by_hand():
    logits_TE = torch.tensor([[math.log(3.0), 0.0]] * 4)
    (layer,) = routing_health([routed([[0], [0], [0], [1]], logits_TE)], 2)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert layer.load == (0.75, 0.25)
    assert layer.max_over_mean == pytest.approx(1.5)
    assert layer.variation == pytest.approx(0.5)
    assert layer.load_entropy == pytest.approx(entropy)
    assert layer.router_entropy == pytest.approx(entropy)


def test_choices_never_made_are_no_drops():
    """A policy may use fewer experts than K; only what it gave up for lack of capacity is dropped."""
    (layer,) = routing_health([routed([[0, -1], [1, -1], [-1, -1], [1, 0]])], 2)
    assert (layer.drop_rate, layer.unrouted) == (0, 0.25)
    assert layer.router_entropy is None
    wanted_TK = torch.tensor([[0, 1], [1, -1], [-1, -1], [1, 0]])
    (layer,) = routing_health([routed([[0, -1], [1, -1], [-1, -1], [1, 0]], None, wanted_TK)], 2)
    assert layer.drop_rate == pytest.approx(1 / 5)


def test_no_choice_at_all_is_reported_without_failing():
    (layer,) = routing_health([routed([[-1], [-1]])], 3)
    assert layer.load == (0, 0, 0)
    assert (layer.dead, layer.unrouted, layer.max_over_mean) == (3, 1, 0)


def test_ranks_together_equal_the_global_batch_in_one_call():
    logits_TE = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    whole = routing_health([top_k_softmax(logits_TE, 2)] * 2, 4)
    halves = [[top_k_softmax(half, 2)] * 2 for half in logits_TE.split(20)]
    sent = []
    for half in halves:
        routing_health(half, 4, lambda sums: sent.append(sums) or sums)
    together = routing_health(halves[0], 4, lambda _: sent[0] + sent[1])
    assert len(sent) == 2
    for ours, expected in zip(together, whole, strict=True):
        assert ours.load == pytest.approx(expected.load)
        assert ours.router_entropy == pytest.approx(expected.router_entropy)
        assert ours.dead == expected.dead


def test_no_mixture_layers_no_health():
    assert routing_health([], 4) == []


def test_churn_counts_changed_top_experts():
    churn = Churn()
    first = Routing(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    swapped = Routing(torch.tensor([[1, 0], [3, 2]]), torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    moved = Routing(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert churn.look([first, first]) is None
    assert churn.look([swapped, moved]) == [0, 0.5]
    assert churn.look([moved, moved], lambda values: values / 2) == [0.25, 0]
