"""Activations that are foreseen, against the storages that autograd keeps."""

from typing import Any

import pytest
import torch

from benchmarks.side_by_side.space import saved_bytes
from megamoe.config import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routers import available
from megamoe.plan.estimate import estimate
from megamoe.plan.workload import checkpointing
from tests.plan.runs import ALONE, one_rank, small_run

SIZES: list[dict[str, Any]] = [
    {},
    {"model": {"pre_norm": True, "attention_dropout": 0.1}, "training": {"batch_size": 1}},
    {
        "model": {"d_model": 64, "n_heads": 4, "d_head": 16, "dropout": 0.0, "segment_len": 256},
        "moe": {"layers": "all", "d_expert": 64, "top_k": 4, "router": {"name": "noisy"}},
    },
    {
        "model": {
            "d_model": 128, "n_heads": 2, "d_head": 64, "d_inner": 256, "vocab_size": 200, "n_layers": 4,
        },
        "moe": {"layers": "1", "n_experts": 16, "d_expert": 128},
        "training": {"batch_size": 4},
    },
]  # fmt: skip


UNCERTAIN = {"relu", "dts", "stratified", "pkm"}
"""Policies that learn how many experts a token takes, and one whose note says what is not counted."""


def kept(run: RunConfig, dtype: torch.dtype) -> int:
    """By a forward pass with a full memory, the loss included."""
    torch.manual_seed(0)
    model = TransformerXL(run.model, run.moe, seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    batch = run.training.batch_size
    ids_BN = torch.randint(run.model.vocab_size, (batch, run.model.segment_len + 1))
    memory = (torch.randn(batch, run.model.memory_len, run.model.d_model, dtype=dtype),) * run.model.n_layers
    outputs: list[Any] = []

    def forward() -> torch.Tensor:
        outputs.append(model(ids_BN[:, :-1], ids_BN[:, 1:], memory))
        loss: torch.Tensor = outputs[0].loss_BS.mean()
        return loss

    return saved_bytes(model, forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sections", SIZES, ids=range(4))
def test_what_is_kept_is_what_autograd_keeps(sections: dict[str, Any], dtype: torch.dtype) -> None:
    run = small_run(**sections)
    logits = run.training.batch_size * run.model.segment_len * run.model.vocab_size * 4
    found = estimate(run, one_rank(run, dtype), ALONE).unchecked
    assert found.kept + logits == pytest.approx(kept(run, dtype), rel=0.05)


@pytest.mark.parametrize("policy", [name for name in available() if name not in UNCERTAIN])
def test_every_policy_keeps_about_what_is_foreseen(policy: str) -> None:
    options = {"gshard": {"capacity_factor": 0}, "switch": {"capacity_factor": 0}, "compete": {"rate": 0}}
    run = small_run(moe={"layers": "all", "router": {"name": policy, **options.get(policy, {})}})
    model = TransformerXL(run.model, run.moe, seed=1)
    logits = run.training.batch_size * run.model.segment_len * run.model.vocab_size * 4
    frozen = sum(4 * buffer.numel() for buffer in model.buffers())  # which autograd keeps too
    found = estimate(run, one_rank(run), ALONE).unchecked.kept + logits
    assert found + frozen == pytest.approx(kept(run, torch.float32), rel=0.1)


def test_checkpointing_keeps_less_and_works_in_more() -> None:
    run = small_run(model={"n_layers": 8}, moe={"layers": "1,3,5,7"})
    found = estimate(run, one_rank(run), ALONE)
    assert found.checkpointed.kept < 0.5 * found.unchecked.kept
    assert found.checkpointed.working > found.unchecked.working
    assert found.memory.activations == found.unchecked.peak
    recomputed = estimate(checkpointing(run, True), one_rank(run), ALONE)
    assert recomputed.memory.activations == found.checkpointed.peak
