"""What is recorded, against the layers' inputs and choices taken one by one."""

import numpy as np
import pytest
import torch

from megamoe.analyze import activations as module
from megamoe.analyze.activations import record
from megamoe.analyze.settings import Settings
from megamoe.moe.exchange import LocalExchange
from tests.analyze.models import byte_model

RNG = np.random.default_rng(0)
TOKENS_WS = RNG.integers(0, 256, (5, 12))


def by_hand(model, tokens_WS, mode, top_k):
    """Maxima [L, U, W] and choices [L, W, E], token by token."""
    maxima, choices = [], []
    seen = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output[1])))
        for layer in model.moe_layers
    ]
    with torch.no_grad():
        model(torch.from_numpy(tokens_WS), top_k=top_k)
    for hook in hooks:
        hook.remove()
    for layer, x_WSD, routing in seen:
        ids_WSK = routing.expert_ids_TK.unflatten(0, tokens_WS.shape)
        experts = layer.experts
        a = np.zeros((layer.n_experts, experts.w_in.shape[1], len(tokens_WS)))
        counts = np.zeros((len(tokens_WS), layer.n_experts))
        for w in range(len(tokens_WS)):
            for s in range(tokens_WS.shape[1]):
                sent = ids_WSK[w, s].tolist()
                for e in range(layer.n_experts):
                    if mode == "dense" or e in sent:
                        h_F = torch.relu(experts.w_in[e] @ x_WSD[w, s] + experts.b_in[e]).detach().numpy()
                        a[e, :, w] = np.maximum(a[e, :, w], h_F)
                    counts[w, e] += sent.count(e)
        maxima.append(a.reshape(-1, len(tokens_WS)))
        choices.append(counts)
    return np.stack(maxima), np.stack(choices)


@pytest.mark.parametrize("mode", ["dense", "routed"])
@pytest.mark.parametrize("router", ["smoe", "hyper", "relu", "switch", "dense"])
def test_maxima_and_choices(mode, router):
    _, model = byte_model(moe={"router": {"name": router}})
    maxima_LUW, choices_LWE = by_hand(model, TOKENS_WS, mode, 2)
    found = record(model, TOKENS_WS, Settings(mode=mode), top_k=2, step=0)
    assert found.maxima_LUW == pytest.approx(maxima_LUW, abs=1e-5)
    assert (found.choices_LWE == choices_LWE).all()


def test_a_policy_that_sends_several_times():
    _, model = byte_model(moe={"router": {"name": "stratified"}})
    dense, routed = (
        record(model, TOKENS_WS, Settings(mode=mode), top_k=1, step=0) for mode in ("dense", "routed")
    )
    assert (dense.maxima_LUW >= routed.maxima_LUW).all()
    assert (dense.maxima_LUW > routed.maxima_LUW).any()
    assert (routed.choices_LWE.sum(2) >= TOKENS_WS.shape[1]).all()


def test_sent_to_all_experts_both_modes_agree():
    _, model = byte_model()
    dense, routed = (
        record(model, TOKENS_WS, Settings(mode=mode), top_k=4, step=0) for mode in ("dense", "routed")
    )
    assert (dense.maxima_LUW == routed.maxima_LUW).all()


def test_a_sample_starts_without_memory_of_others(monkeypatch):
    _, model = byte_model()
    together = record(model, TOKENS_WS, Settings(), top_k=2, step=0)
    monkeypatch.setattr(module, "SAMPLES_AT_ONCE", 2)
    apart = record(model, TOKENS_WS[::-1].copy(), Settings(), top_k=2, step=0)
    assert apart.maxima_LUW[:, :, ::-1] == pytest.approx(together.maxima_LUW, abs=1e-5)


def test_the_model_is_left_as_it_was():
    _, model = byte_model()
    record(model, TOKENS_WS, Settings(), top_k=2, step=0)
    assert [type(layer.exchange) for layer in model.moe_layers] == [LocalExchange] * 2
