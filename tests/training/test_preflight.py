"""``megamoe preflight`` on real processes: all well, and with a rank, a disk or a folder that is not."""

import json
import signal
from pathlib import Path

import pytest

from megamoe.errors import ExitCode
from tests.processes import ranks, wait_until

pytestmark = pytest.mark.distributed

TOY = (
    "model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.d_head=8", "model.d_inner=16",
    "model.segment_len=16", "model.memory_len=16", "moe.n_experts=4", "moe.d_expert=2000", "moe.top_k=2",
    "moe.schedule.mode=constant", "training.batch_size=4", "evaluation.every=0", "evaluation.top_ks=2",
    "evaluation.max_tokens=256",
)  # fmt: skip


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "preflight" in path.name]


def test_equal_ranks_are_measured_and_nothing_stays_behind(tmp_path: Path) -> None:
    with ranks(2, "preflight", "--preset", "tiny_enwik8", "--json", *TOY, folder=tmp_path) as processes:
        outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    report = json.loads(outputs[0])
    assert outputs[1] == ""
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        positive = ("host_free", "flops", "link", "disk_write", "disk_read", "disk_free")
        assert min(rank[name] for name in positive) > 0
        assert abs(rank["clock"]) < 5
    assert report["ranks"][0]["gpu_free"] is None
    assert not any(finding["stops"] for finding in report["findings"])
    assert report["seconds"].keys() == {"all_reduce", "all_to_all", "arithmetic", "checkpoint"}
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_predicted_is_the_one_written(tmp_path: Path) -> None:
    with ranks(1, "preflight", "--preset", "tiny_enwik8", "--json", *TOY, folder=tmp_path) as (process,):
        needs = json.loads(process.communicate()[0])["needs"]
    assert needs["all_reduce"] == needs["all_to_all"] == 0
    with ranks(
        1, "train", "--preset", "tiny_enwik8", *TOY, "training.max_steps=1", "name=one", folder=tmp_path
    ) as (process,):
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    files = (tmp_path / "runs/one/checkpoints/step-000000001").rglob("*.safetensors")
    written = sum(path.stat().st_size for path in files)
    assert needs["checkpoint"] == pytest.approx(written, rel=0.02)


def test_ranks_with_different_configs_are_told_apart_before_they_wait_for_each_other(tmp_path: Path) -> None:
    words = ("preflight", "--preset", "tiny_enwik8", *TOY)
    with ranks(2, *words, folder=tmp_path, of_rank={1: ["moe.ep_size=2", "training.seed=3"]}) as processes:
        output, _ = processes[0].communicate()
        processes[1].communicate()
    assert [process.returncode for process in processes] == [1, 1]
    assert "problem: config differs: " in output
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_a_problem(tmp_path: Path) -> None:
    words = ("preflight", "--preset", "tiny_enwik8", *TOY, "checkpoint.keep_last=100000000")
    with ranks(1, *words, folder=tmp_path) as (process,):
        output, _ = process.communicate()
    assert process.returncode == 1
    assert "problem: rank 0: checkpoint folder has" in output
    assert "100000001 checkpoints need" in output


def test_a_rank_that_stops_is_named(tmp_path: Path) -> None:
    words = ("preflight", "--preset", "tiny_enwik8", "--timeout=8", *TOY)
    with ranks(2, *words, folder=tmp_path) as processes:
        wait_until(lambda: any(tmp_path.glob(".preflight-*-1")), *processes)
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=120)
    assert processes[0].returncode == ExitCode.LOST_RANK
    assert "--timeout = 8: no progress for so many seconds" in errors
    assert "rank 1" in errors
