from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.convert.clusters import balanced_clusters
from megamoe.convert.merge import merged_config
from megamoe.convert.split import split_config
from megamoe.errors import CheckpointError, ConfigError
from tests.checkpoint.small import model_of
from tests.convert.dense import require_same_function, weights, write_dense
from tools.convert_checkpoint import main


def convert(command: str, source: Path, output: Path, *options: str) -> None:
    assert main([command, str(source), str(output), *options]) == 0


@pytest.mark.parametrize("by", ["index", "clusters"])
@pytest.mark.parametrize("layers", ["all", "1"])
def test_a_divided_model_computes_what_the_dense_one_did(tmp_path: Path, by: str, layers: str) -> None:
    dense = write_dense(tmp_path / "dense")
    convert(
        "split", tmp_path / "dense", tmp_path / "parts", "--n-experts", "4", "--by", by, "--layers", layers
    )
    model = load_model(tmp_path / "parts")
    assert model.moe_config.d_expert == 6
    require_same_function(model, dense)
    convert("merge", tmp_path / "parts", tmp_path / "again")
    require_same_function(load_model(tmp_path / "again"), dense)


@pytest.mark.parametrize("options", [[], ["--router", "smoe", "--top-k", "2"]])
def test_splitting_and_merging_gives_every_bit_back(tmp_path: Path, options: list[str]) -> None:
    write_dense(tmp_path / "dense")
    convert("split", tmp_path / "dense", tmp_path / "parts", "--n-experts", "4", *options)
    convert("merge", tmp_path / "parts", tmp_path / "again")
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_softmax_weights_sum_the_chosen_parts(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    convert("split", tmp_path / "dense", tmp_path / "parts", "--n-experts", "4", "--router", "smoe")
    model = load_model(tmp_path / "parts")
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight.zero_()  # all experts alike: weights 1/4, times k = 4
    require_same_function(model, dense)


def test_the_mean_of_equal_experts_is_the_dense_model(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    convert("upcycle", tmp_path / "dense", tmp_path / "moe", "--n-experts", "3")
    convert("merge", tmp_path / "moe", tmp_path / "again", "--how", "mean")
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_clusters_are_equal_in_size_and_find_what_belongs_together() -> None:
    directions = torch.eye(4)[torch.tensor([0, 1, 2, 3] * 5)]
    rows = directions * torch.rand(20, 1).add(0.5) + 0.05 * torch.randn(20, 4)
    found = [balanced_clusters(rows, 4, seed) for seed in range(8)]
    assert all(torch.equal(clusters.bincount(), torch.full((4,), 5)) for clusters in found)
    groups = torch.arange(20) % 4
    together = groups[:, None] == groups
    assert any(torch.equal(clusters[:, None] == clusters, together) for clusters in found)
    assert torch.equal(found[0], balanced_clusters(rows, 4, 0))


def test_what_cannot_be_split_or_merged_is_refused() -> None:
    dense, _ = model_of(moe={"layers": "none"})
    mixture, _ = model_of(moe={"layers": "1"})
    with pytest.raises(CheckpointError, match=r"--n-experts = 7: give a divisor of model\.d_inner = 24"):
        split_config(dense, 7)
    with pytest.raises(ConfigError, match="--top-k = 2: leave it out"):
        split_config(dense, 4, 2)
    with pytest.raises(CheckpointError, match="start from a dense one"):
        split_config(mixture, 4)
    with pytest.raises(CheckpointError, match="no mixture layers to merge"):
        merged_config(dense, "concat")
    with pytest.raises(CheckpointError, match=r"model.d_inner = 24: merged networks are 32 wide"):
        merged_config(mixture, "concat")
    with pytest.raises(CheckpointError, match="adds experts up; use --how concat"):
        merged_config(split_config(dense, 4), "mean")
