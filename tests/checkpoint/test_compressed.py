"""Damaged compressed checkpoints: each is refused with one error, or is whole after all."""

from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.compressed import open_reader
from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.compress.methods import compress
from megamoe.compress.settings import Settings
from megamoe.compress.source import Source
from megamoe.errors import CheckpointError, ConfigError, MegaMoEError
from tests.checkpoint.fuzzing import fuzz
from tests.checkpoint.hostile import MUTATIONS, swap_shards
from tests.checkpoint.small import model_of, write_model

N_MUTATIONS = 150
OF_ONE_SHARD = [mutation for mutation in MUTATIONS if mutation is not swap_shards]


@pytest.fixture(scope="module", params=["prune", "svd"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    write_model(folder / "in", *model_of(), tokenizer={"kind": "bytes"})
    compress(
        Source(folder / "in"), Settings(method="resmoe", residual=request.param, keep=0.5), folder / "out"
    )
    return folder / "out"


def outcome(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    try:
        load_tokenizer(folder)
        load_model(folder, experts="on_the_fly")
        found = load_model(folder).state_dict()
    except MegaMoEError as error:
        assert "\n" not in str(error)
        return "refused"
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    return "whole"


def test_no_damage_is_loaded(pristine: Path, tmp_path: Path) -> None:
    expected = load_model(pristine).state_dict()
    assert outcome(pristine, expected) == "whole"
    outcomes = fuzz(
        pristine, OF_ONE_SHARD, range(N_MUTATIONS), lambda folder: outcome(folder, expected), tmp_path
    )
    assert outcomes["refused"] > 0.75 * outcomes.total()


def test_the_two_kinds_of_folder_are_not_taken_for_each_other(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="from-compressed"):
        CheckpointReader(pristine)
    neutral = write_model(tmp_path / "neutral", *model_of())
    (neutral / "compression.json").write_text("{}")
    with pytest.raises(CheckpointError, match="format = 'megamoe-checkpoint': expected 'megamoe-compressed'"):
        open_reader(neutral)


def test_an_unknown_mode_is_refused(pristine: Path) -> None:
    with pytest.raises(ConfigError, match="experts = 'fast': give restore, on_the_fly, factored"):
        load_model(pristine, experts="fast")
