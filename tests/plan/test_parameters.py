"""Parameters that are foreseen, against models that are built, and against sums by hand."""

from dataclasses import replace

import pytest

from megamoe.config import RunConfig, load_config
from megamoe.config.presets import PRESETS
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.experts import Experts
from megamoe.moe.routers import available
from megamoe.plan.estimate import estimate
from megamoe.plan.inventory import inventory
from megamoe.plan.vocabulary import with_known_vocabulary
from tests.plan.runs import ALONE, one_rank, small_run


@pytest.mark.parametrize("policy", available())
def test_every_policy_has_as_many_as_its_model(policy: str) -> None:
    run = small_run(moe={"router": {"name": policy}})
    model = TransformerXL(run.model, run.moe, seed=1)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    trained = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    )
    found = estimate(run, one_rank(run), ALONE).parameters
    assert (found.total, found.frozen, found.experts) == (trained + buffers, buffers, experts)
    assert found.shared + found.experts + found.frozen == found.total
    assert sum(share.held for share in inventory(run).shares(one_rank(run))) == trained


def by_hand(run: RunConfig) -> tuple[int, int]:
    """Trained and frozen numbers of a HyperRouter preset."""
    model, moe = run.model, run.moe
    width, inner, hyper = model.d_model, model.n_heads * model.d_head, moe.router.options["hyper_size"]
    tails = len(model.cutoffs)
    trained = model.vocab_size * (width + 1) + tails * (width + 1) + 2 * inner
    frozen = 0
    mixtures = moe.layer_indices(model.n_layers)
    for layer in range(model.n_layers):
        trained += 5 * inner * width + 4 * width
        if layer in mixtures:
            trained += moe.n_experts * (2 * width * moe.d_expert + moe.d_expert + width) + width
            generated = moe.n_experts * (width + 1)
            frozen += hyper * (width + 1) + generated * (hyper + 1)
        else:
            trained += 2 * width * model.d_inner + model.d_inner + width
    return trained, frozen


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_as_many_as_its_layers_sum_to(preset: str) -> None:
    run = with_known_vocabulary(load_config(preset=preset))
    counts = inventory(run).counts
    assert (counts.trainable, counts.frozen) == by_hand(run)


def test_active_ones_are_those_of_k_experts() -> None:
    run = small_run()
    few, many = (
        estimate(run, one_rank(run), ALONE, top_k=top_k).parameters.active for top_k in (2, 5)
    )  # fmt: skip
    one_expert = 2 * 32 * 24 + 24 + 32
    assert many - few == 2 * 3 * one_expert
    assert replace(run.moe, top_k=2) == run.moe
