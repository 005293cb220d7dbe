"""Every preset is a model that can be built, of the size it is said to have."""

from dataclasses import replace

import pytest
import torch

from megamoe.config.load import load_config
from megamoe.config.presets import PRESETS
from megamoe.models.transformer_xl import TransformerXL

VOCABULARY = {"enwik8": 256, "text8": 256, "wikitext2": 33_278, "wikitext103": 267_735}
BILLIONS = {"xl_enwik8": 1.23, "xl_wikitext103": 1.50, "xxl_enwik8": 18.4, "xxl_wikitext103": 18.9}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds(name):
    run = load_config(preset=name)
    with torch.device("meta"):
        model = TransformerXL(replace(run.model, vocab_size=VOCABULARY[run.data.dataset]), run.moe, seed=1)
    assert len(model.moe_layers) == len(run.moe.layer_indices(run.model.n_layers)) > 0
    if name in BILLIONS:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)
