"""What arithmetic says a run needs, against what a real step moves and a real kernel allows."""

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.parallel.launch import read_launch, start
from megamoe.training.preflight.memory import free_host_memory
from megamoe.training.preflight.needs import Needs, needs_of
from tests.parallel.runs import VOCAB, batch, build_engine, small_run
from tests.ranks import run_ranks
from tests.training.runs import BF16, FP32


def needs(ds: dict[str, Any], world_size: int, *, offloads: bool = False, **sections: Any) -> Needs:
    run = small_run(model={"vocab_size": VOCAB}, **sections)
    resolved = resolve_ds_config(run, ds, world_size, Device("cpu", bf16=True, fp16=False))
    return needs_of(run, layout_of(run, resolved, world_size), offloads=offloads)


def test_memory_and_reductions_follow_precision_and_stage() -> None:
    fp32, bf16, alone = needs(FP32, 2), needs(BF16, 2), needs(FP32, 1)
    zero0, zero1, zero2, zero3 = (
        needs({"zero_optimization": {"stage": stage}}, 2, moe={"ep_size": 1}) for stage in range(4)
    )
    assert bf16.all_reduce * 2 == fp32.all_reduce
    assert bf16.memory < fp32.memory < alone.memory
    assert zero3.memory < zero2.memory
    assert zero1.all_reduce == zero2.all_reduce == zero3.all_reduce == int(1.5 * zero0.all_reduce)
    assert alone.all_reduce == alone.all_to_all == 0


def test_experts_that_one_rank_alone_holds_are_not_reduced() -> None:
    apart, shared = (needs(FP32, 2, moe={"ep_size": ep_size}) for ep_size in (2, 1))
    one_layer = 8 * (16 * 12 * 2 + 12 + 16) * 4
    assert shared.all_reduce - apart.all_reduce == 1.5 * 2 * one_layer  # ZeRO 1


def test_offloaded_states_move_to_host_memory() -> None:
    held, offloaded = needs(FP32, 2), needs(FP32, 2, offloads=True)
    assert held.memory + held.host_memory == offloaded.memory + offloaded.host_memory
    assert offloaded.host_memory > held.host_memory


def count_exchanges(recompute: bool, top_k: int) -> tuple[int, int]:
    """Bytes that this rank gives into exchanges of rows in one step, and what is foreseen."""
    world = start(read_launch())
    run = small_run(
        model={"dropout": 0.1, "vocab_size": VOCAB}, moe={"ep_size": 2, "top_k": top_k},
        training={"activation_checkpointing": recompute},
    )  # fmt: skip
    engine = build_engine(run, FP32, world)
    sent = 0
    exchange = dist.all_to_all_single

    def counted(received: torch.Tensor, given: torch.Tensor, *sizes: Any, **settings: Any) -> Any:
        nonlocal sent
        sent += given.nbytes if sizes else 0  # the numbers of rows, E integers, come without sizes
        return exchange(received, given, *sizes, **settings)

    dist.all_to_all_single = counted
    for i in range(engine.micro_batches):
        rows = engine.micro_batch_rows(i)
        rows_BN = batch(0)[rows.start : rows.stop]
        output = engine.forward(rows_BN[:, :-1], rows_BN[:, 1:], step=0, rows=rows)
        engine.backward(output.loss_BS.mean())
    dist.all_to_all_single = exchange
    resolved = resolve_ds_config(run, FP32, 2, Device.detect())
    return sent, needs_of(run, layout_of(run, resolved, 2)).all_to_all


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", [False, True])
def test_the_bytes_of_exchanges_are_those_that_a_step_sends(recompute: bool) -> None:
    """Of both ranks together: what comes back from experts follows from what others sent there."""
    per_rank = run_ranks(count_exchanges, 2, recompute, 8)  # all experts, so every token goes to both
    assert sum(sent for sent, _ in per_rank) == sum(foreseen for _, foreseen in per_rank) > 0


@pytest.mark.distributed
def test_two_experts_per_token_are_on_fewer_than_two_ranks() -> None:
    """How many depends on the routing, which is foreseen as even."""
    per_rank = run_ranks(count_exchanges, 2, False, 2)
    assert sum(sent for sent, _ in per_rank) == pytest.approx(sum(n for _, n in per_rank), rel=0.25)
    everywhere = needs(FP32, 2, moe={"ep_size": 2, "top_k": 8}).all_to_all_message
    twice = needs(FP32, 2, moe={"ep_size": 2, "top_k": 2}).all_to_all_message
    assert twice / everywhere == pytest.approx(1 - math.comb(4, 2) / math.comb(8, 2), rel=1e-3)


GROUP = {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 3000\ninactive_file 700\n"}
OLD_GROUP = {
    "memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "4000",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 700\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job/step", "job", GROUP),
        ("0::/job/step", "job/step", GROUP),
        ("4:memory:/job/step", "memory/job", OLD_GROUP),
        ("9:name=systemd:/\n4:cpu,memory:/job/step", "memory/job/step", OLD_GROUP),
    ],
)
def test_a_job_may_have_less_memory_than_its_node(
    line: str, folder: str, files: dict[str, str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text(line + "\n")
    groups = tmp_path / "groups"
    (groups / "job/step").mkdir(parents=True)
    (groups / folder).mkdir(parents=True, exist_ok=True)
    assert free_host_memory(groups, mine) == pytest.approx(psutil.virtual_memory().available, rel=0.05)
    for name, content in files.items():
        (groups / folder / name).write_text(content)
    assert free_host_memory(groups, mine) == 1700
    (groups / folder / "memory.max").write_text("max\n")
    (groups / folder / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert free_host_memory(groups, mine) == pytest.approx(psutil.virtual_memory().available, rel=0.05)
