"""Bytes on both networks, against what is reckoned by hand. Live runs are in benchmarks/accuracy."""

import pytest
import torch

from megamoe.parallel.ds_config import Layout
from megamoe.plan.devices import Cluster
from megamoe.plan.estimate import Estimate, estimate
from megamoe.plan.inventory import inventory
from megamoe.plan.traffic import Ring
from megamoe.plan.workload import ranks_per_token
from tests.plan.runs import CPU, small_run

BF16 = torch.bfloat16


def found(
    nodes: int,
    per_node: int,
    ep_size: int,
    stage: int = 1,
    accumulation: int = 1,
    **sections: dict[str, object],
) -> Estimate:
    ranks = nodes * per_node
    run = small_run(**{"training": {"batch_size": ranks * accumulation}} | sections)  # type: ignore[arg-type]
    layout = Layout(ranks, ep_size, 1, accumulation, stage, BF16)
    return estimate(run, layout, Cluster(nodes, per_node, CPU))


@pytest.mark.parametrize(
    ("ring", "slow_share"),
    [
        (Ring(8, 1, 8), 0),  # one node
        (Ring(16, 1, 8), 1 / 8),  # two nodes of eight
        (Ring(4, 4, 8), 1 / 2),  # experts of one place of four: two on each node
        (Ring(4, 8, 8), 1),  # one on each node
        (Ring(2, 1, 1), 1),
    ],
)
def test_of_a_ring_one_edge_leaves_each_node(ring: Ring, slow_share: float) -> None:
    moved = ring.moved(1000, 2, 3, 1)
    assert moved.total == pytest.approx(2 * (ring.n_ranks - 1) / ring.n_ranks * 1000)
    assert moved.slow == pytest.approx(slow_share * moved.total)
    assert moved.calls == 3


def test_nothing_moves_alone() -> None:
    alone = found(1, 1, 1).traffic
    assert alone.all_reduce.total == alone.all_gather.total == alone.all_to_all.total == 0


def test_gradients_of_experts_go_over_those_that_hold_the_same() -> None:
    counts = inventory(small_run()).counts
    apart, two, together = (found(1, 4, ep_size).traffic for ep_size in (4, 2, 1))
    assert apart.all_reduce.tensors == 2 * counts.shared
    assert together.all_reduce.tensors == 2 * counts.trainable
    assert two.all_reduce.tensors == 2 * (counts.shared + counts.experts / 2)
    half = 2 * counts.experts / 2
    assert two.all_reduce.total == pytest.approx(1.5 * 2 * counts.shared + 2 * (1 / 2) * half)
    assert two.reduce_scatter.total == 0


def test_stages_differ_in_what_they_repeat() -> None:
    first, second = (found(1, 4, 2, stage=stage, accumulation=3).traffic for stage in (1, 2))
    assert second.all_reduce.total == 3 * first.all_reduce.total
    assert second.all_gather.total == first.all_gather.total > 0
    assert found(1, 4, 4, stage=0).traffic.all_gather.total == 0
    third = found(1, 4, 1, stage=3).traffic
    assert third.all_reduce.total == 0
    assert third.all_gather.total == pytest.approx(2 * third.reduce_scatter.total, rel=1e-3)


def test_tokens_travel_to_ranks_in_proportion() -> None:
    inside, across = found(1, 4, 4).traffic.all_to_all, found(2, 2, 4).traffic.all_to_all
    assert inside.slow == 0
    assert across.total == pytest.approx(inside.total)
    assert across.slow == pytest.approx(2 / 3 * across.total)
    copies = ranks_per_token(8, 2, 4)
    rows = 4 * 160 * copies * 32 * 2
    choices = 16 * 160 * 2
    keys = 8 * 160 * copies
    each = rows + choices + keys + 16 * 4
    assert inside.total == pytest.approx(2 * each * 3 / 4)
    again = found(1, 4, 4, training={"batch_size": 4, "activation_checkpointing": True}).traffic.all_to_all
    assert again.total == pytest.approx(2 * (1.5 * rows + 28 * 160 * 2 + 2 * keys + 2 * 16 * 4) * 3 / 4)


def test_all_experts_are_on_all_ranks_and_one_on_one() -> None:
    assert ranks_per_token(8, 8, 4) == 4
    assert ranks_per_token(8, 1, 4) == 1
    assert ranks_per_token(8, 2, 1) == 1


def test_policies_without_experts_exchange_nothing() -> None:
    pkm = found(1, 2, 1, moe={"router": {"name": "pkm"}})
    assert pkm.traffic.all_to_all.total == pkm.memory.exchange == 0
