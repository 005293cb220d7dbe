"""Operations that are foreseen, against those that torch counts in a real step."""

from collections import Counter
from typing import Any

import pytest
import torch

from megamoe.config import RunConfig, load_config
from megamoe.data.samples import read_sample
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers import available
from megamoe.plan.estimate import estimate
from megamoe.plan.vocabulary import cluster_shares, with_known_vocabulary
from megamoe.plan.workload import checkpointing
from megamoe.training.profile.flops import flop_counter
from tests.plan.runs import ALONE, one_rank, small_run

LEARNED = {"dts", "relu", "stratified"}
"""Policies that learn how many experts a token takes."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    # Capacities drop choices, which depends on the tokens.
    "gshard": [{"capacity_factor": 0}],
    "switch": [{"capacity_factor": 0}],
    "hyper": [{}, {"learned": True}, {"shared": True}],
    "compete": [{"rate": 0}, {"rate": 1, "layers_at_once": 0}],
    "lms": [{}, {"fuse": True}],
}


def counted(run: RunConfig, ids_BN: torch.Tensor | None = None) -> int:
    """Forward and backward pass with a full memory, and the auxiliary losses."""
    torch.manual_seed(0)
    model = TransformerXL(run.model, run.moe, seed=1)
    model.set_activation_checkpointing(run.training.activation_checkpointing)
    batch, length = run.training.batch_size, run.model.segment_len + 1
    ids_BN = torch.randint(run.model.vocab_size, (batch, length)) if ids_BN is None else ids_BN
    width = run.model.memory_len * model.n_routes
    memory = (torch.randn(batch, width, run.model.d_model),) * run.model.n_layers
    with flop_counter() as counter:
        output = model(ids_BN[:, :-1], ids_BN[:, 1:], memory)
        extra, _ = auxiliary_loss(output.routings, run.moe, ONE_RANK.mean)
        (output.loss_BS.mean() + extra).backward()
    return counter.get_total_flops()


def foreseen(run: RunConfig) -> float:
    return estimate(run, one_rank(run), ALONE, top_k=run.moe.top_k).flops.per_step


@pytest.mark.parametrize("policy", [name for name in available() if name not in LEARNED])
def test_every_policy_takes_as_many_as_torch_counts(policy: str) -> None:
    for options in OPTIONS.get(policy, [{}]):
        run = small_run(moe={"router": {"name": policy, **options}})
        assert foreseen(run) == pytest.approx(counted(run), rel=0.01), options


@pytest.mark.parametrize("policy", sorted(LEARNED))
def test_where_the_number_of_experts_is_learned_the_most_is_foreseen_and_said(policy: str) -> None:
    run = small_run(moe={"router": {"name": policy}})
    found = estimate(run, one_rank(run), ALONE)
    assert counted(run) <= found.flops.per_step
    assert any("is learned" in note for note in found.notes)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"activation_checkpointing": True}},
        {"training": {"activation_checkpointing": True}, "model": {"pre_norm": True}},
        {"training": {"activation_checkpointing": True}, "model": {"pre_norm": True, "dropout": 0.0}},
        {"model": {"segment_len": 100, "memory_len": 0}},
        {"model": {"same_length": True, "d_embed": 20, "tie_weights": False}},
        {"model": {"vocab_size": 20_000}},
        {"moe": {"layers": "none"}},
        {"moe": {"layers": "all", "top_k": 8}},
        {"moe": {"balance_loss": 0.1, "z_loss": 0.1, "router": {"name": "noisy"}}},
    ],
    ids=str,
)
def test_every_kind_of_model_takes_as_many_as_torch_counts(sections: dict[str, Any]) -> None:
    run = small_run(**sections)
    assert foreseen(run) == pytest.approx(counted(run), rel=0.01)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny_enwik8", []),
        ("small_enwik8", ["training.batch_size=1"]),
        ("tiny_wikitext2", ["training.batch_size=2"]),
        ("xl_enwik8", ["model.n_layers=2", "model.segment_len=128", "moe.layers=1", "moe.n_experts=8"]),
    ],
)
def test_presets_take_as_many_as_torch_counts(preset: str, overrides: list[str]) -> None:
    changed = [*overrides, *(["training.batch_size=1"] if preset.startswith("xl") else [])]
    run = load_config(preset=preset, overrides=[*changed, "moe.schedule.mode=constant"])
    run = with_known_vocabulary(run)
    assert foreseen(run) == pytest.approx(counted(run), rel=0.01)


def test_rare_words_take_as_many_as_zipf_foresees() -> None:
    run = small_run(
        model={"vocab_size": 6000, "cutoffs": [200, 1000], "div_val": 2, "segment_len": 160},
        training={"batch_size": 8},
    )
    law_V = 1 / torch.arange(1, 6001)
    law_V[5000:] = (torch.arange(5001, 6001) / 5000) ** -1.6 / 5000
    generator = torch.Generator().manual_seed(5)
    ids_BN = torch.multinomial(law_V, 8 * 161, replacement=True, generator=generator).view(8, 161)
    assert foreseen(run) == pytest.approx(counted(run, ids_BN), rel=0.01)


def test_zipf_is_near_the_words_of_wikitext() -> None:
    counts = Counter(read_sample("wikitext-2.train.tokens").decode().split())
    falling = sorted(counts.values(), reverse=True)
    for cutoff in (1000, 5000, 20_000):
        run = small_run(model={"vocab_size": len(falling), "cutoffs": [cutoff]})
        share = sum(falling[:cutoff]) / sum(falling)
        assert cluster_shares(run.model)[0] == pytest.approx(share, abs=0.04)


def test_ratio_of_the_peak_leaves_out_what_is_repeated() -> None:
    run = small_run()
    plain, twice = (estimate(checkpointing(run, on), one_rank(run), ALONE) for on in (False, True))
    assert plain.flops.model_per_step == twice.flops.model_per_step == plain.flops.per_step
    assert twice.flops.per_step > plain.flops.per_step
