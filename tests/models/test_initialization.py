import pytest
import torch

from megamoe.models.transformer_xl import TransformerXL
from tests.models.builders import small_model

WIDE = {
    "vocab_size": 600, "cutoffs": (200, 400), "div_val": 2, "d_model": 64, "d_head": 32, "d_inner": 128,
    "n_heads": 8, "init_std": 0.02, "projection_init_std": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_model() -> TransformerXL:
    return small_model(moe_layers="0", **WIDE)


def test_values_have_the_published_distribution(wide_model: TransformerXL) -> None:
    zero_leaves = ("bias", "b_in", "b_out", "cluster_bias")
    for name, parameter in wide_model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if name.endswith("router.embedding"):
            mean, std = 0.0, 1.0
        elif owner.endswith("_norm") and leaf == "weight":
            mean, std = 1.0, 0.02
        elif leaf in zero_leaves or owner == "output.biases":
            mean, std = 0.0, 0.0
        else:
            mean, std = 0.0, 0.01 if "projections" in owner else 0.02
        # Five standard errors of the mean, and of the deviation.
        error = 5 * std / parameter.numel() ** 0.5
        assert parameter.mean().item() == pytest.approx(mean, abs=error), name
        assert parameter.std().item() == pytest.approx(std, abs=error), name


def test_no_two_tensors_start_alike(wide_model: TransformerXL) -> None:
    drawn = [value.flatten()[:16] for value in wide_model.state_dict().values() if value.std() > 0]
    starts = {tuple((value / value.norm()).tolist()) for value in drawn}
    assert len(starts) == len(drawn) > 20


def test_values_depend_on_the_seed_and_the_name_alone() -> None:
    torch.manual_seed(1)
    first = small_model(n_layers=2).state_dict()
    torch.manual_seed(2)
    deeper = small_model(n_layers=3).state_dict()
    assert set(first) < set(deeper)
    assert all(torch.equal(first[name], deeper[name]) for name in first)
    other = small_model(seed=6).state_dict()
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert {"embedding.weights.0", "attention_bias_u", "layers.1.moe.experts.w_in"} < changed


def test_without_memory_a_model_has_the_same_tensors(wide_model: TransformerXL) -> None:
    with torch.device("meta"):
        counted = small_model(moe_layers="0", **WIDE).state_dict()
    assert {name: (value.shape, value.dtype, value.device.type) for name, value in counted.items()} == {
        name: (value.shape, value.dtype, "meta") for name, value in wide_model.state_dict().items()
    }
