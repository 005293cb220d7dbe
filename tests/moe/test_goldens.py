"""The mixture layer, given the published implementation's parameters and inputs, gives its numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.routing import RouterContext

FORWARD = Path(__file__).parents[1] / "goldens/forward"
CASES = [
    ("hyperrouter_tiny", "hyper"),
    ("hyperrouter_h6", "hyper"),
    ("prelnorm_hyper", "hyper"),
    ("mixed_tiny", "hyper"),
    ("smoe_tiny", "smoe"),
    ("smoe_tiny", "smoe_dropout"),
]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def load(case):
    with np.load(FORWARD / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def published_layer(golden, index, policy):
    prefix = f"param/layers.{index}.pos_ff."
    n_experts, d_expert, d_model = golden[f"{prefix}experts.htoh4.weight"].shape
    options = {"hyper_size": len(golden[f"{prefix}gate.hypernet.0.bias"])} if policy == "hyper" else {}
    moe = MoEConfig(n_experts=n_experts, d_expert=d_expert, router=RouterConfig(name=policy, options=options))
    layer = MoELayer(d_model, moe, layer=index, seed=0, dropout=0.0, init_std=0.02)
    linear = {"router.weight": "gate.gate.weight", "router.bias": "gate.gate.bias"}
    hyper = {
        "router.embedding": "gate.embedding",
        "router.hypernet_w_in": "gate.hypernet.0.weight",
        "router.hypernet_b_in": "gate.hypernet.0.bias",
        "router.hypernet_w_out": "gate.hypernet.2.weight",
        "router.hypernet_b_out": "gate.hypernet.2.bias",
    }
    experts = {
        "experts.w_in": "experts.htoh4.weight",
        "experts.b_in": "experts.htoh4.bias",
        "experts.w_out": "experts.h4toh.weight",
        "experts.b_out": "experts.h4toh.bias",
    }
    names = experts | (hyper if policy == "hyper" else linear)
    ours = layer.state_dict()
    layer.load_state_dict(
        {name: golden[prefix + theirs].view_as(ours[name]) for name, theirs in names.items()}
    )
    return layer


def layers_and_ks(golden):
    found = (name.split("/") for name in golden if name.endswith("/moe_out"))
    return sorted((int(layer[5:]), int(k[1:])) for k, layer, _ in found)


@pytest.mark.parametrize("case, policy", CASES)
def test_logits_weights_and_outputs(case, policy):
    golden = load(case)
    compared = layers_and_ks(golden)
    assert len(compared) >= 2
    for index, k in compared:
        expected = {
            name: golden[f"k{k}/layer{index}/{name}"]
            for name in ("moe_in", "gate_logits", "combine", "moe_out")
        }
        layer = published_layer(golden, index, policy)
        y, routing = layer(expected["moe_in"][None], RouterContext(step=0, seed=0, top_k=k))
        combine = torch.zeros_like(expected["combine"]).scatter(1, routing.expert_ids_TK, routing.weights_TK)
        torch.testing.assert_close(routing.logits_TE, expected["gate_logits"], **TOLERANCE)
        torch.testing.assert_close(combine, expected["combine"], **TOLERANCE)
        torch.testing.assert_close(y[0], expected["moe_out"], **TOLERANCE)


@pytest.mark.parametrize("case, hyper_size", [("hyperrouter_tiny", 256), ("hyperrouter_h6", 6)])
def test_generated_router(case, hyper_size):
    golden = load(case)
    for index in (0, 1):
        router = published_layer(golden, index, "hyper").router
        weight_ED, bias_E = router.generate()
        assert router.options.hyper_size == hyper_size
        torch.testing.assert_close(weight_ED, golden[f"router/layer{index}/weight"], **TOLERANCE)
        torch.testing.assert_close(bias_E, golden[f"router/layer{index}/bias"], **TOLERANCE)


def test_one_choice_has_weight_one_and_teaches_the_embedding_nothing():
    golden = load("hyperrouter_tiny")
    layer = published_layer(golden, 0, "hyper")
    y, routing = layer(golden["k1/layer0/moe_in"][None], RouterContext(step=0, seed=0, top_k=1))
    y.square().sum().backward()
    assert torch.equal(routing.weights_TK, torch.ones_like(routing.weights_TK))
    assert torch.count_nonzero(layer.router.embedding.grad) == 0
    assert torch.count_nonzero(layer.experts.w_in.grad) > 0
    assert torch.count_nonzero(golden["k1/grad/layers.0.pos_ff.gate.embedding"]) == 0
