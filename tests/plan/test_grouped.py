"""What is foreseen of GPUs, whose experts are grouped products, against the same products on this CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamoe.config import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe import experts
from megamoe.moe.grouped import mix_grouped
from megamoe.plan.devices import Cluster
from megamoe.plan.estimate import Estimate, estimate
from megamoe.training.profile.flops import flop_counter
from tests.plan.runs import CPU, one_rank, small_run
from tests.plan.test_activations import SIZES, kept

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_path", lambda x_ND, w_in: mix_grouped)


def on_gpu(run: RunConfig) -> Estimate:
    return estimate(run, one_rank(run, BF16), Cluster(1, 1, replace(CPU, kind="cuda")))


@pytest.mark.parametrize("sections", SIZES, ids=range(4))
def test_what_is_kept_is_what_autograd_keeps(sections: dict[str, Any]) -> None:
    run = small_run(**sections)
    logits = run.training.batch_size * run.model.segment_len * run.model.vocab_size * 4
    assert on_gpu(run).unchecked.kept + logits == pytest.approx(kept(run, BF16), rel=0.05)


def test_operations_are_those_that_are_counted() -> None:
    run = small_run(moe={"top_k": 4})
    model = TransformerXL(run.model, run.moe, seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.to(BF16)
    batch = run.training.batch_size
    ids_BN = torch.randint(run.model.vocab_size, (batch, run.model.segment_len + 1))
    memory = (torch.randn(batch, run.model.memory_len, run.model.d_model, dtype=BF16),) * run.model.n_layers
    with flop_counter() as counter:
        model(ids_BN[:, :-1], ids_BN[:, 1:], memory).loss_BS.mean().backward()
    assert on_gpu(run).flops.per_step == pytest.approx(counter.get_total_flops(), rel=0.01)
