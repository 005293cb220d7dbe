"""Signs of life, and who is blamed when a run stands still."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from megamoe.config import RunConfig
from megamoe.parallel.launch import World
from megamoe.training.heartbeat import Heartbeat, Sign, Watch, describe_hang, read_signs, sign_file
from tests.processes import wait_until

SIGN = Sign(rank=0, host="node1", pid=100, beats=40, step=10, phase="backward", seconds_since_beat=600.0)


def signs(*beats: int) -> list[Sign | None]:
    return [replace(SIGN, rank=rank, beats=count) for rank, count in enumerate(beats)]


def test_a_silent_rank_is_blamed() -> None:
    report = describe_hang(signs(40, 40, 40, 40), [0.0, 0.1, 90.0, 0.0], [2], "limit = 600")
    assert "rank 2 on node1 (process 100): silent, last seen 690 s ago after step 10 in backward" in report
    assert "waiting after step 10 in backward: ranks 0-1, 3" in report


def test_a_rank_that_was_never_seen_is_blamed() -> None:
    report = describe_hang([*signs(40), None], [0.0, None], [1], "limit = 600")
    assert "rank 1: never seen" in report
    assert "waiting after step 10 in backward: rank 0" in report


def test_a_rank_behind_the_others_is_blamed_where_all_live() -> None:
    late = replace(SIGN, rank=1, beats=39, phase="data")
    report = describe_hang([SIGN, late], [0.0, 0.0], [], "limit = 600")
    assert "rank 1 on node1 (process 100): behind, last seen 600 s ago after step 10 in data" in report
    assert "waiting after step 10 in backward: rank 0" in report


def test_nobody_is_blamed_where_all_stand_at_one_place() -> None:
    report = describe_hang(signs(40, 40), [0.0, 0.0], [], "limit = 600")
    assert "no rank is behind the others" in report
    assert "ranks 0-1" in report


def test_signs_are_written_read_and_taken_away(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    heartbeat.beat("forward", 3)
    # Of a run before that had more ranks, and of one that died while it wrote.
    sign_file(tmp_path, 7).write_text("{}")
    sign_file(tmp_path, 1).write_text('{"rank"')
    watch = Watch(heartbeat, RunConfig(), World(0, 2, torch.device("cpu")), tmp_path)
    watch.interval = 0.01
    watch.start()
    wait_until(sign_file(tmp_path, 0).exists)
    watch.stop(keep_sign=True)
    (own, torn), ages = read_signs(tmp_path, 2)
    assert own is not None
    assert (own.pid, own.step, own.phase, own.beats) == (os.getpid(), 3, "forward", 1)
    assert (torn, ages) == (None, [0.0, None])
