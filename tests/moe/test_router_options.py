"""Every option of every policy changes what training with it gives."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from megamoe.config.schema import ModelConfig, MoEConfig, RouterConfig
from megamoe.errors import ConfigError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.layer import MoELayer
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers import resolve_options, router_class
from megamoe.moe.routers.registry import BUILT_IN
from tests.moe.policies import D, E, F, S, V, context_of, learn, tokens

# Policy, option, another value, and what else must be set for it to matter.
PROBES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("base", "", None, {}),
    ("bias_balanced", "rate", 0.5, {}),
    ("clustering", "stats", "batch", {}),
    ("clustering", "decay", 0.5, {}),
    ("clustering", "min_share", 0.25, {}),
    ("compete", "response", "norm", {"rate": 1.0}),
    ("compete", "rate", 1.0, {}),
    ("compete", "warm_up_steps", 9, {"rate": 1.0}),
    ("compete", "layers_at_once", 1, {"rate": 1.0}),
    ("compete", "temperature", 0.1, {"rate": 1.0}),
    ("compete", "winners_weight", 0.5, {"rate": 1.0}),
    ("compete", "distill_loss", 0.5, {"rate": 1.0}),
    ("compete", "diversity_loss", 0.5, {"rate": 1.0}),
    ("cosine", "width", 3, {}),
    ("cosine", "temperature", 0.1, {}),
    ("dense", "drop", 0.5, {}),
    ("dts", "tau_start", 1.0, {}),
    ("dts", "tau_end", 0.1, {"tau_steps": 4}),
    ("dts", "tau_steps", 4, {}),
    ("dts", "threshold", 0.3, {}),
    ("expert_choice", "capacity", 1.0, {}),
    ("gshard", "capacity_factor", 0.4, {}),
    ("gshard", "first_choice_loss", 0.5, {}),
    ("hash", "", None, {}),
    ("hyper", "hyper_size", 5, {}),
    ("hyper", "shared", True, {}),
    ("hyper", "learned", True, {}),
    ("hyper", "start_std", 0.1, {}),
    ("lms", "domains", 3, {}),
    ("lms", "rank", 3, {}),
    ("lms", "fuse", True, {}),
    ("lms", "consistency_loss", 0.5, {"fuse": True}),
    ("logit_dropout", "drop", 0.1, {}),
    ("noisy", "importance_loss", 0.5, {}),
    ("noisy", "load_loss", 0.5, {}),
    ("omni", "group", 1, {}),
    ("omni", "noise", 0.5, {}),
    ("pkm", "heads", 2, {}),
    ("pkm", "keys", 3, {}),
    ("random", "", None, {}),
    ("relu", "sparsity_loss", 0.5, {"lambda_start": 1.0}),
    ("relu", "lambda_start", 0.5, {}),
    ("relu", "rate", 2.0, {"lambda_start": 1.0}),
    ("sigma", "drop", 0.4, {}),
    ("sigma", "entropy_loss", 0.5, {}),
    ("similarity", "frequency", 0.1, {"threshold": -1.0}),
    ("similarity", "threshold", -1.0, {"frequency": 0.1}),
    ("similarity", "kernel", "rbf", {"frequency": 0.1, "threshold": -1.0}),
    ("similarity", "sigma", 0.2, {"frequency": 0.1, "threshold": -1.0, "kernel": "rbf"}),
    ("similarity", "width", 3, {"frequency": 0.1, "threshold": -1.0}),
    ("similarity", "similarity_loss", 0.5, {"frequency": 0.1, "threshold": -1.0}),
    ("sinkhorn", "iterations", 1, {}),
    ("smoe", "", None, {}),
    ("smoe_dropout", "", None, {}),
    ("stable", "stage_steps", 2, {}),
    ("stable", "light_size", 7, {}),
    ("stable", "distill_loss", 0.5, {}),
    ("stable", "load_loss", 0.5, {}),
    ("stratified", "strata", (3, 1), {}),
    ("stratified", "strata_loss", 0.5, {}),
    ("switch", "capacity_factor", 0.4, {}),
    ("switch", "eval_capacity_factor", 0.4, {}),
    ("switch", "jitter", 0.5, {}),
    ("thor", "consistency_loss", 0.1, {}),
    ("topk", "", None, {}),
]  # fmt: skip


def figures(name: str, options: dict[str, Any]) -> list[float]:
    """Trained numbers, losses and outputs of two layers over a few steps in training, then in evaluation."""
    router = RouterConfig(name=name, options=options)
    moe = MoEConfig(n_experts=E, d_expert=F, top_k=2, router=router, balance_loss=0.0)
    layers: list[MoELayer] = []
    for depth in range(2):
        below = layers[-1].router if layers else None
        layers.append(
            MoELayer(
                D, moe, layer=depth, seed=5, dropout=0.0, init_std=0.5, below=below, n_layers=2, vocab_size=V
            ).double()
        )
    found = [sum(p.numel() for layer in layers for p in layer.parameters())]
    for step in range(6):
        context = context_of(step=step)
        routings = []
        for layer in layers:
            y, routing = layer(tokens(step), context)
            found.append(y.square().sum().item())
            routings.append(routing)
            learn(layer, tokens(step), context)
        found.append(auxiliary_loss(routings, moe, ONE_RANK.mean)[0].item())
    if router_class(name).routes(resolve_options(router)) > 1:
        sizes = {"n_layers": 2, "d_model": D, "n_heads": 1, "d_head": D, "segment_len": S, "memory_len": 0}
        model = TransformerXL(ModelConfig(vocab_size=V, **sizes), moe, seed=5)
        ids_BS = torch.arange(3 * S).view(3, S) % V
        for parameter in model.parameters():
            parameter.data.add_(0.1)
        output = model(ids_BS, ids_BS.roll(-1, 1), domains_B2=torch.tensor([[1, 2], [2, 1], [0, 0]]))
        found.append(auxiliary_loss(output.routings, moe, ONE_RANK.mean)[0].item())
    for layer in layers:
        found.append(layer.eval()(tokens(9), context_of())[0].square().sum().item())
    return found


@pytest.mark.parametrize(
    ("name", "option", "value", "besides"), [probe for probe in PROBES if probe[1]], ids=str
)
def test_an_option_reaches_its_module(name, option, value, besides):
    assert figures(name, besides) != figures(name, besides | {option: value})
    assert figures(name, besides) == figures(name, dict(besides))


def test_no_option_is_forgotten():
    probed = {(name, option) for name, option, *_ in PROBES if option}
    assert probed == {(name, field.name) for name in BUILT_IN for field in fields(router_class(name).Options)}
    assert {name for name, *_ in PROBES} == set(BUILT_IN)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("switch", {"capacity_factor": -1}, "moe.router.capacity_factor = -1.0: give 0 or more"),
        ("switch", {"jitter": 1}, "moe.router.jitter = 1.0: give a probability in [0, 1)"),
        ("smoe", {"capacity_factor": 2}, "moe.router.capacity_factor = 2: unknown key"),
        ("sigma", {"drp": 0.1}, "moe.router.drp = 0.1: unknown key, did you mean 'drop'?"),
        ("compete", {"rate": 2}, "moe.router.rate = 2.0: give a share of the steps in [0, 1]"),
        ("compete", {"response": "softmax"}, "moe.router.response = 'softmax': "),
        ("clustering", {"stats": "all"}, "moe.router.stats = 'all': "),
        ("expert_choice", {"capacity": 0}, "moe.router.capacity = 0.0: give a number above 0"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(name, options, message):
    with pytest.raises(ConfigError) as error:
        resolve_options(RouterConfig(name=name, options=options))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "n_experts", "vocab_size", "message"),
    [
        (
            "stratified",
            {"strata": (2, 3)},
            E,
            V,
            "moe.router.strata = (2, 3): give numbers above 0 that sum to",
        ),
        ("gshard", {}, 1, V, "moe.n_experts = 1: policy 'gshard' needs 2 or more"),
        ("stable", {}, E, 0, "model.vocab_size = 0: policy 'stable' looks tokens up"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(name, options, n_experts, vocab_size, message):
    moe = MoEConfig(n_experts=n_experts, d_expert=F, top_k=1, router=RouterConfig(name=name, options=options))
    with pytest.raises(ConfigError) as error:
        MoELayer(D, moe, layer=0, seed=5, dropout=0.0, init_std=0.5, vocab_size=vocab_size)
    assert str(error.value).startswith(message)


def test_the_strings_of_a_command_line_are_understood():
    options = resolve_options(RouterConfig(name="stratified", options={"strata": "1,3"}))
    assert options.strata == (1, 3)
