import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import megamoe
from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.errors import CheckpointError
from tests.checkpoint.small import model_of, write_model


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:09d}"
        write_model(folder, *model_of(training={"seed": step}), step=step, tokenizer={"kind": "bytes"})
    return tmp_path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_newest_checkpoint_of_a_run_is_loaded(run):
    model = load_model(run)
    assert same(model, model_of(training={"seed": 2})[1])
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_step_is_loaded_by_its_folder(run):
    assert same(load_model(run / "checkpoints" / "step-000000001"), model_of(training={"seed": 1})[1])


def test_the_tokenizer_comes_with_it(run):
    assert list(load_tokenizer(run).encode("ab")) == [97, 98]


def test_a_damaged_tokenizer_is_one_error(tmp_path):
    write_model(tmp_path / "best", *model_of(), tokenizer={"kind": "runes"})
    with pytest.raises(CheckpointError, match="tokenizer kind = 'runes'"):
        load_tokenizer(tmp_path / "best")


def test_a_config_that_is_not_the_models_is_refused(tmp_path):
    config, model = model_of()
    lie = replace(config, model=replace(config.model, d_inner=12))
    with pytest.raises(CheckpointError, match=r"feed_forward.*in the model"):
        load_model(write_model(tmp_path / "best", lie, model))
    lie = replace(config, model=replace(config.model, vocab_size=0))
    with pytest.raises(CheckpointError, match=r"config\.json: model\.vocab_size"):
        load_model(write_model(tmp_path / "best", lie, model))


def test_importing_megamoe_is_light_and_load_model_is_there():
    code = (
        "import sys, megamoe; assert 'torch' not in sys.modules;"
        "megamoe.load_model; assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert megamoe.load_model is load_model
    with pytest.raises(AttributeError, match="load_modell"):
        _ = megamoe.load_modell
