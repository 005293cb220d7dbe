"""The odd node is named, and nobody else."""

from dataclasses import replace
from typing import Any

import pytest

from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.judge import judge, judge_versions
from megamoe.training.preflight.needs import Needs

NEEDS = Needs(all_reduce=10**8, all_to_all=10**8, memory=10**9, checkpoint=10**9)
WELL = [Facts(rank, f"node{rank}", {}, 64 * 10**9, 1, 1e9, 0.0, 5e8, 9e8, 10**12) for rank in range(4)]


def test_equal_nodes_give_no_finding() -> None:
    assert judge(WELL, NEEDS, 3, 0.1) == []


@pytest.mark.parametrize(
    ("change", "stops", "text"),
    [
        ({"memory_free": 10**8}, True, "0.10 GB of memory free; a rank here need"),
        ({"memory_free": 3 * 10**9, "ranks_on_host": 4}, True, "4 ranks here need 4.00 GB"),
        ({"disk_free": 10**9}, True, "3 checkpoints need 3.00 GB"),
        ({"shared_folder": False}, True, "not the one that rank 0 sees"),
        ({"disk_error": "read-only"}, True, "read-only"),
        ({"link": 1e8}, False, "link 100 MB/s, the median is 1000 MB/s"),
        ({"disk_write": 1e8}, False, "disk write 100 MB/s"),
        ({"clock": -2.0}, False, "-2000 ms"),
    ],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_the_odd_node_alone_is_named(change: dict[str, Any], stops: bool, text: str, odd: int) -> None:
    facts = [replace(fact, **change) if fact.rank == odd else fact for fact in WELL]
    (finding,) = judge(facts, NEEDS, 3, 0.1)
    assert finding.stops is stops
    assert finding.text.startswith(f"node{odd}: ")
    assert text in finding.text


def test_a_node_with_several_ranks_is_named_once() -> None:
    facts = [replace(fact, host=f"node{fact.rank // 2}", clock=9.0 * (fact.rank > 1)) for fact in WELL]
    facts += [replace(fact, rank=fact.rank + 4, host="node2") for fact in WELL[:2]]
    (finding,) = judge(facts, NEEDS, 3, 0.1)
    assert finding.text == "node1: clock is +9000 ms off the median"


def test_of_two_nodes_nobody_can_say_whose_clock_is_wrong() -> None:
    facts = [WELL[0], replace(WELL[1], clock=-0.75)]
    (finding,) = judge(facts, NEEDS, 3, 0.5)
    assert finding.text == "node0: clock is 750 ms ahead of node1's; one of the two is wrong"


def test_ranks_of_one_node_are_named_by_number() -> None:
    facts = [replace(fact, host="node", disk_write=1e8 if fact.rank == 3 else 5e8) for fact in WELL]
    (finding,) = judge(facts, NEEDS, 3, 0.5)
    assert finding.text.startswith("rank 3: disk write 100 MB/s")


def test_versions_are_judged_by_the_majority_if_there_is_one() -> None:
    old, new = {"torch": "2.7", "python": "3.11"}, {"torch": "2.8", "python": "3.11"}
    assert judge_versions({"a": new, "b": new}) == []
    (finding,) = judge_versions({"a": new, "b": old, "c": new})
    assert finding.text == "b: torch is 2.7, elsewhere 2.8"
    (finding,) = judge_versions({"a": new, "b": old})
    assert finding.text == "torch differs: 2.8 at a, 2.7 at b"
    assert finding.stops
