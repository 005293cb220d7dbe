"""Masks and noise do to a model what changed weights would."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe.analyze.functions import Function
from megamoe.analyze.perturbation import Disturbing, Masked, Noisy
from megamoe.analyze.settings import Settings
from tests.analyze.models import byte_model

TOKENS_WS = np.random.default_rng(0).integers(0, 256, (6, 14))
FUNCTION = Function("f", np.arange(6), np.arange(6) < 3)
NONE = np.array([], np.int64)


def disturbing(model, top_k=2):
    return Disturbing(model, TOKENS_WS, FUNCTION, Settings(draws=3), {"top_k": top_k, "step": 0})


def bits_with(found, make):
    from megamoe.analyze.exchanges import standing_in

    with standing_in(found.model, make):
        return found.bits()


def test_bits_are_those_of_the_model():
    _, model = byte_model()
    tokens_BS = torch.from_numpy(TOKENS_WS)
    with torch.no_grad():
        loss_BS = model(tokens_BS[:, :-1], tokens_BS[:, 1:], top_k=2).loss_BS
    assert disturbing(model).bits() == pytest.approx(loss_BS.mean(1).numpy() / np.log(2), rel=1e-5)


def test_a_mask_is_a_logit_of_minus_infinity():
    _, model = byte_model()
    found = disturbing(model, top_k=4)
    masked = bits_with(found, lambda i, _: Masked(np.array([1, 3]), torch.device("cpu")))
    before = found.bits()
    for layer in model.moe_layers:
        layer.router.bias.data[[1, 3]] = -1e9
    assert masked == pytest.approx(found.bits(), rel=1e-5)
    assert masked != pytest.approx(before, rel=1e-3)


def test_masked_everywhere_a_token_goes_to_no_expert():
    _, model = byte_model()
    found = disturbing(model)
    masked = bits_with(found, lambda i, _: Masked(np.arange(4), torch.device("cpu")))
    for layer in model.moe_layers:
        layer.experts.w_out.data.zero_()
        layer.experts.b_out.data.zero_()
    assert masked == pytest.approx(found.bits(), rel=1e-5)


def test_noise_of_size_0_silences_neurons():
    _, model = byte_model()
    found = disturbing(model)
    neurons = np.array([0, 3, 8 + 7, 3 * 8 + 2])

    def noisy(size):
        return lambda i, layer: Noisy(layer.experts, neurons, size, torch.Generator().manual_seed(0))

    silent, loud, again = (bits_with(found, noisy(size)) for size in (0.0, 2.0, 2.0))
    assert (loud == again).all()
    assert silent != pytest.approx(loud, rel=1e-3)
    for layer in model.moe_layers:
        for neuron in neurons:
            layer.experts.w_out.data[neuron // 8, :, neuron % 8] = 0
    assert silent == pytest.approx(found.bits(), rel=1e-5)


def test_effects_and_their_random_counterparts():
    _, model = byte_model()
    found = disturbing(model)
    functional, neurons = [np.array([2]), NONE], [np.arange(4), np.arange(8, 12)]
    effects = found.effects(functional, neurons, [1.0, 1.0])
    assert {kind: len(draws) for kind, draws in effects.items() if kind != "before"} == {
        "experts": 1, "random experts": 3, "neurons": 1, "random neurons": 3,
    }  # fmt: skip
    before = found.bits()
    assert effects["before"] == {
        "own": pytest.approx(before[:3].mean()), "others": pytest.approx(before[3:].mean()),
    }  # fmt: skip
    mask = bits_with(found, lambda i, _: Masked(functional[i], torch.device("cpu"))) - before
    assert effects["experts"] == [
        {"own": pytest.approx(mask[:3].mean()), "others": pytest.approx(mask[3:].mean())}
    ]
    assert found.effects(functional, neurons, [1.0, 1.0]) == effects
    assert "experts" not in found.effects([NONE, NONE], neurons, [1.0, 1.0])


def test_random_counterparts_are_others():
    _, model = byte_model()
    found = replace(disturbing(model), settings=Settings(draws=20))
    for draw in range(20):
        first, second = found._others([np.array([2]), NONE], 4, draw)
        assert len(first) == 1 and first[0] != 2
        assert len(second) == 0
    assert len(found._others([np.array([0, 1, 2])], 4, 0)[0]) == 1
