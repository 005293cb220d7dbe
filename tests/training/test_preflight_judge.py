"""The odd node is named, and nobody else."""

from dataclasses import replace
from typing import Any

import pytest

from megamoe.training.preflight.judge import Facts, judge
from megamoe.training.preflight.needs import Needs

NEEDS = Needs(all_reduce=10**8, all_to_all=10**8, memory=10**9, checkpoint=10**9)
WELL = [
    Facts(rank, f"node{rank}", {"torch": "2.8"}, 64 * 10**9, 1, 1e9, 0.0, 5e8, 9e8, 10**12)
    for rank in range(4)
]


def test_equal_nodes_give_no_finding() -> None:
    assert judge(WELL, NEEDS, 3, 0.1) == []


@pytest.mark.parametrize(
    ("change", "stops", "text"),
    [
        ({"versions": {"torch": "2.7"}}, True, "torch is 2.7, elsewhere 2.8"),
        ({"memory_free": 10**8}, True, "0.10 GB memory free"),
        ({"memory_free": 3 * 10**9, "ranks_on_host": 4}, True, "4 rank(s)"),
        ({"disk_free": 10**9}, True, "3 checkpoints need 3.00 GB"),
        ({"shared_folder": False}, True, "not the one rank 0 sees"),
        ({"disk_error": "read-only"}, True, "read-only"),
        ({"link": 1e8}, False, "link 100 MB/s, median 1000 MB/s"),
        ({"disk_write": 1e8}, False, "disk write 100 MB/s"),
        ({"clock": -2.0}, False, "-2000 ms"),
    ],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_the_odd_node_alone_is_named(change: dict[str, Any], stops: bool, text: str, odd: int) -> None:
    facts = [replace(fact, **change) if fact.rank == odd else fact for fact in WELL]
    (finding,) = judge(facts, NEEDS, 3, 0.1)
    assert finding.stops is stops
    assert finding.text.startswith(f"rank {odd} on node{odd}: ")
    assert text in finding.text
