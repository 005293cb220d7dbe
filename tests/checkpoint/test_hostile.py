"""A thousand damaged checkpoints: each is refused with one error, or is whole after all."""

import pytest
import torch

from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.errors import CheckpointError
from megamoe.parallel.placement import saved_buffers
from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.hostile import MUTATIONS
from tests.checkpoint.runs import held_tensors
from tests.checkpoint.small import model_of, write_small

N_MUTATIONS = 1000
N_GROUPS = 10


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    config, model = model_of()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {("weight", name): values for name, values in weights.items()}
    tensors |= {("exp_avg", name): values / 2 for name, values in weights.items()}
    tensors |= {("exp_avg_sq", name): values.square() for name, values in weights.items()}
    tensors |= {("buffer", name): buffer for name, buffer in saved_buffers(model).items()}
    tensors["memory", "layers.0"] = torch.ones(4, 2, 16)
    folder = tmp_path_factory.mktemp("pristine") / "best"
    return write_small(
        folder, tensors, config=config, tokenizer={"kind": "bytes"}, schedule={"factor": 0.5}, best_metric=2.5
    )


def outcome(folder, expected):
    """What loading says: the error, or that every tensor is the one that was saved."""
    try:
        load_tokenizer(folder)
        model = load_model(folder)
        found = held_tensors(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return "refused"
    assert all(torch.equal(values, expected[key]) for key, values in found.items())
    loaded = dict(model.named_parameters()) | saved_buffers(model)
    for (kind, name), values in expected.items():
        if kind in ("weight", "buffer"):
            assert loaded[name].dtype == values.dtype
            assert torch.equal(loaded[name], values)
    return "whole"


@pytest.mark.parametrize("group", range(N_GROUPS))
def test_no_damage_is_loaded(pristine, tmp_path, group):
    expected = held_tensors(pristine)
    assert outcome(pristine, expected) == "whole"
    seeds = range(group, N_MUTATIONS, N_GROUPS)
    outcomes = fuzz(pristine, MUTATIONS, seeds, lambda folder: outcome(folder, expected), tmp_path)
    assert outcomes["refused"] > 0.75 * outcomes.total()
