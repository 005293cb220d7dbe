"""The odd node is named, and nobody else."""

from dataclasses import replace
from typing import Any

import pytest

from megamoe.training.preflight.facts import Facts
from megamoe.training.preflight.judge import Finding, judge, judge_versions, seconds_of
from megamoe.training.preflight.needs import Needs

NEEDS = Needs(
    all_reduce=10**8, all_to_all=10**8, all_to_all_message=10**7, flops=1e13, memory=10**9, host_memory=0,
    checkpoint=10**9,
)  # fmt: skip
WELL = [
    Facts(
        rank, f"node{rank}", host_free=64 * 10**9, flops=1e13, link=1e9, disk_write=5e8, disk_read=9e8,
        disk_free=10**12,
    )
    for rank in range(4)
]  # fmt: skip
SPEEDS = {"all_reduce": {10**6: 1e9, 10**8: 1e9}, "all_to_all": {10**6: 1e9, 10**7: 2e9}}


def findings(facts: list[Facts], needs: Needs = NEEDS, patience: float = 0.0) -> list[Finding]:
    return judge(facts, needs, seconds_of(facts, needs, SPEEDS), kept=3, patience=patience, max_skew=0.5)


def test_equal_nodes_give_no_finding() -> None:
    assert findings(WELL) == []


@pytest.mark.parametrize(
    ("change", "stops", "text"),
    [
        ({"host_free": 10**8}, True, "100.0 MB of host memory free; a rank here needs 1.0 GB before"),
        ({"host_free": 3 * 10**9, "ranks_on_host": 4}, True, "4 ranks here need 4.0 GB"),
        ({"gpu_free": 10**8}, True, "100.0 MB of GPU memory free; a rank needs 1.0 GB"),
        ({"disk_free": 10**9}, True, "3 checkpoints need 3.0 GB"),
        ({"shared_folder": False}, True, "not the one that rank 0 sees"),
        ({"disk_error": "read-only"}, True, "read-only"),
        ({"link": 1e8}, False, "link 100.0 MB/s, the median is 1.0 GB/s"),
        ({"disk_write": 1e8}, False, "disk write 100.0 MB/s"),
        ({"flops": 2e12}, False, "arithmetic 2.0 TFLOP/s, the median is 10.0 TFLOP/s"),
        ({"clock": -2.0}, False, "-2000 ms"),
    ],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_the_odd_node_alone_is_named(change: dict[str, Any], stops: bool, text: str, odd: int) -> None:
    facts = [replace(fact, **change) if fact.rank == odd else fact for fact in WELL]
    (finding,) = findings(facts)
    assert finding.stops is stops
    assert finding.text.startswith(f"node{odd}: ")
    assert text in finding.text


def test_a_node_with_several_ranks_is_named_once() -> None:
    facts = [replace(fact, host=f"node{fact.rank // 2}", clock=9.0 * (fact.rank > 1)) for fact in WELL]
    facts += [replace(fact, rank=fact.rank + 4, host="node2") for fact in WELL[:2]]
    (finding,) = findings(facts)
    assert finding.text == "node1: clock is +9000 ms off the median"


def test_of_two_nodes_nobody_can_say_whose_clock_is_wrong() -> None:
    facts = [WELL[0], replace(WELL[1], clock=-0.75)]
    (finding,) = findings(facts)
    assert finding.text == "node0: clock is 750 ms ahead of node1's; one of the two is wrong"


def test_ranks_of_one_node_are_named_by_number() -> None:
    facts = [replace(fact, host="node", disk_write=1e8 if fact.rank == 3 else 5e8) for fact in WELL]
    (finding,) = findings(facts)
    assert finding.text.startswith("rank 3: disk write 100.0 MB/s")


def test_versions_are_judged_by_the_majority_if_there_is_one() -> None:
    old, new = {"torch": "2.7", "python": "3.11"}, {"torch": "2.8", "python": "3.11"}
    assert judge_versions({"a": new, "b": new}) == []
    (finding,) = judge_versions({"a": new, "b": old, "c": new})
    assert finding.text == "b: torch is 2.7, elsewhere 2.8"
    (finding,) = judge_versions({"a": new, "b": old})
    assert finding.text == "torch differs: 2.8 at a, 2.7 at b"
    assert finding.stops


def test_what_the_run_takes_is_compared_with_what_it_may() -> None:
    (finding,) = findings(WELL, replace(NEEDS, all_reduce=10**10))
    assert finding.text == "the network bounds this run: 10 s of communication a step for 1 s of arithmetic"
    assert not finding.stops
    (finding,) = findings(WELL, patience=0.4)
    assert finding.text == "a checkpoint takes 0.5 s to write, more than training.hang_timeout = 0.4"
    assert finding.stops


def test_time_is_that_of_messages_of_like_size_and_of_the_slowest_rank() -> None:
    facts = [WELL[0], replace(WELL[1], flops=5e12, disk_write=1e8)]
    assert seconds_of(facts, NEEDS, SPEEDS) == {
        "all_reduce": 0.1, "all_to_all": 0.05, "arithmetic": 2.0, "checkpoint": 5.0,
    }  # fmt: skip
