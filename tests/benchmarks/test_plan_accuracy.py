"""The accounts that ranks keep, against counts by hand; and a quick run of the benchmark."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import plan_accuracy
from benchmarks.accuracy.parameters import count_built, run_of
from benchmarks.accuracy.rows import FLOPS, MET, MISSED, NOT_PROMISED, PARAMETERS, Row, table, verdicts
from benchmarks.accuracy.traffic import TrafficCounter
from benchmarks.plan_accuracy import QUICK
from megamoe.models.transformer_xl import TransformerXL
from tests.ranks import run_ranks


def send_something() -> tuple[dict[tuple[str, str], float], list[int]]:
    """On two ranks: collectives forward, a gradient's reduction backward, an exchange of unequal rows."""
    phase, looked = "forward", []
    with TrafficCounter(lambda: phase, lambda phase, tensors: looked.extend(map(len, tensors))) as traffic:
        values = torch.ones(100)
        dist.all_reduce(values)  # 2 * 1/2 of 400
        dist.all_gather_into_tensor(torch.empty(200), values)  # 1/2 of 800
        dist.all_gather([torch.empty(100), torch.empty(100)], values)  # the same
        dist.reduce_scatter_tensor(torch.empty(50), values)  # 1/2 of 400
        dist.reduce(values, 0)  # the same
        dist.broadcast(values, 1)  # the same
        dist.barrier()
        linear = nn.Linear(10, 1, bias=False)
        linear.weight.register_post_accumulate_grad_hook(lambda weight: dist.all_reduce(weight.grad))
        loss = linear(torch.ones(10)).sum()
        phase = "backward"
        loss.backward()  # 2 * 1/2 of 40
        phase = "exchange"
        rank = dist.get_rank()
        splits = [3, 2] if rank == 0 else [1, 4]  # of rows of 8 bytes; 2 leave rank 0, 1 leaves rank 1
        received = [3, 1] if rank == 0 else [2, 4]
        dist.all_to_all_single(torch.empty(sum(received), 2), torch.ones(5, 2), received, splits)
        dist.all_to_all_single(torch.empty(6), torch.ones(6))  # 3 of 6 numbers
        dist.all_to_all_single(torch.empty(0), torch.ones(0), [0, 0], [0, 0])
    return dict(traffic.sent), looked


@pytest.mark.distributed
def test_what_two_ranks_send_is_counted() -> None:
    for rank, (sent, looked) in enumerate(run_ranks(send_something, 2)):
        assert sent == {
            ("forward", "all_reduce"): 400, ("forward", "all_gather"): 800,
            ("forward", "reduce_scatter"): 200, ("forward", "reduce"): 200, ("forward", "broadcast"): 200,
            ("backward", "all_reduce"): 40, ("exchange", "all_to_all"): (16, 8)[rank] + 12,
        }  # fmt: skip
        assert looked == [100, 1]  # a vector, and a matrix of one row


def test_rows_are_judged_by_the_bound_of_their_claim() -> None:
    rows = [
        Row(FLOPS, "a", "x", 1000, 1009), Row(FLOPS, "a", "y", 100, 98), Row(FLOPS, "b", "x", 100),
        Row(FLOPS, "b", "y", 100, 150, promised=False), Row(PARAMETERS, "a", "n", 7, 7),
        Row(PARAMETERS, "b", "n", 0, 1), Row(PARAMETERS, "c", "n", 0, 0),
    ]  # fmt: skip
    assert [row.verdict for row in rows] == [
        MET, MISSED, NOT_PROMISED, NOT_PROMISED, MET, MISSED, MET,
    ]  # fmt: skip
    assert list(verdicts(rows)) == [
        "| parameters | 0 % | 3 | inf %: n, b | MISSED by 1 |",
        "| FLOPs of a step | 1 % | 2 | 2 %: y, a | MISSED by 1 |",
    ]
    assert table(rows[:4]).splitlines() == [
        "| | x | y |",
        "|---|---|---|",
        "| a | 1,000 (+0.9 %) | 100 (**-2.0 %**) |",
        "| b | 100 | 100 (*+50.0 %*) |",
    ]


def test_built_models_are_counted() -> None:
    run = run_of("tiny_enwik8", "hyper")
    counts = count_built(run)
    model = TransformerXL(run.model, run.moe, seed=1)
    d_model, width = run.model.d_model, run.moe.d_expert
    assert counts["in experts"] == 2 * 16 * (2 * d_model * width + d_model + width)
    assert counts["frozen"] == sum(buffer.numel() for buffer in model.buffers()) > 0
    assert counts["all"] == counts["frozen"] + sum(p.numel() for p in model.parameters())


@pytest.mark.distributed
def test_a_quick_run_compares_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "accuracy"
    monkeypatch.setattr(plan_accuracy, "QUICK", replace(QUICK, steps=2))
    monkeypatch.setattr("sys.argv", ["plan_accuracy", "--quick", "--output", str(output)])
    plan_accuracy.main()
    result, text = json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    rows = {(row["claim"], row["quantity"], row["case"]): row for row in result["rows"]}
    assert {claim for claim, *_ in rows} == {
        "parameters", "FLOPs of a step", "bytes that a rank holds", "bytes that a rank sends in a step",
        "activations",
    }  # fmt: skip
    held = "bytes that a rank holds"
    exchanged = rows[held, "weights", "even, 2 ranks, EP 2, ZeRO 1, fp32"]["measured"]
    whole = rows[held, "weights", "even, 2 ranks, EP 1, ZeRO 2, fp32"]["measured"]
    in_experts = 2 * 8 * (2 * 32 * 48 + 32 + 48) * 4
    assert whole - exchanged == pytest.approx(in_experts / 2, abs=64)
    sent = "bytes that a rank sends in a step"
    assert (sent, "tokens to experts and back", "even, 2 ranks, EP 1, ZeRO 2, fp32") not in rows
    assert rows[sent, "tokens to experts and back", "even, 2 ranks, EP 2, ZeRO 1, fp32"]["measured"] > 0
    exact = [row for row in result["rows"] if row["claim"] == "parameters"]
    assert {row["verdict"] for row in exact} == {MET}
