"""The published runs as their scripts have them."""

import pytest

from megamoe.config.load import load_config
from megamoe.config.presets import PRESETS, preset_values


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_run(name):
    run = load_config(preset=name)
    assert run.moe.layer_indices(run.model.n_layers)


@pytest.mark.parametrize(
    ("size", "layers", "steps", "batch"),
    [("small", 4, 400_000, 22), ("medium", 8, 400_000, 22), ("large", 18, 50_000, 44)],
)
@pytest.mark.parametrize("corpus", ["enwik8", "text8", "wikitext103"])
def test_published_settings(size, layers, steps, batch, corpus):
    run = load_config(preset=f"{size}_{corpus}")
    model, moe = run.model, run.moe
    assert run.data.dataset == corpus
    assert (model.n_layers, model.d_model, model.n_heads, model.d_head, model.d_inner) == (
        layers,
        256,
        8,
        64,
        512,
    )
    assert (model.segment_len, model.memory_len, model.dropout, model.attention_dropout) == (
        512,
        512,
        0.1,
        0.0,
    )
    assert (moe.layers, moe.n_experts, moe.d_expert, moe.top_k) == ("0,1,2,3", 16, 512, 2)
    assert (moe.schedule.mode, moe.schedule.min_k, moe.schedule.max_k) == ("linear_increase", 8, 16)
    assert (moe.router.name, moe.router.options) == ("hyper", {"hyper_size": 256})
    assert (run.optimizer.name, run.optimizer.lr, run.optimizer.schedule, run.optimizer.warmup_steps) == (
        "adam", 2.5e-4, "cosine", 0,
    )  # fmt: skip
    assert (run.training.max_steps, run.training.batch_size, run.training.grad_clip) == (steps, batch, 0.25)
    assert (run.training.seed, run.evaluation.segment_len, run.evaluation.batch_size) == (1111, 128, 10)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_hypernetwork_width_that_the_scripts_ask_for(size):
    asked, ran = load_config(preset=f"{size}_enwik8_h64"), load_config(preset=f"{size}_enwik8")
    assert (asked.moe.router.options, ran.moe.router.options) == ({"hyper_size": 64}, {"hyper_size": 256})


def test_a_preset_cannot_be_changed_through_its_values():
    preset_values("tiny_enwik8")["model"]["n_layers"] = 99
    assert load_config(preset="tiny_enwik8").model.n_layers == 2
