import pytest
import torch

from megamoe.config.load import load_config
from megamoe.models.parameter_counts import parameter_counts
from megamoe.models.transformer_xl import TransformerXL

# The published model also counts one unused linear router per HyperRouter layer, which ours has not.
UNUSED_ROUTERS = 4 * 16 * (256 + 1)


@pytest.mark.parametrize(
    ("preset", "overrides", "vocabulary", "total", "without_hypernets"),
    [
        ("small_enwik8", [], 204, 24.01, 19.52),
        ("medium_enwik8", [], 204, 27.69, 23.20),
        ("large_enwik8", [], 204, 36.88, 32.39),
        ("small_wikitext103", [], 267_735, 92.77, 88.28),
        ("small_enwik8", ["moe.layers=none", "model.d_inner=8192"], 204, 19.49, 19.49),
    ],
)
def test_counts_are_those_of_the_published_models(
    preset: str, overrides: list[str], vocabulary: int, total: float, without_hypernets: float
) -> None:
    run = load_config(preset=preset, overrides=[*overrides, f"model.vocab_size={vocabulary}"])
    with torch.device("meta"):
        model = TransformerXL(run.model, run.moe, seed=1)
    counts = parameter_counts(model)
    unused = UNUSED_ROUTERS if model.moe_layers else 0
    assert round((counts.total + unused) / 1e6, 2) == total
    assert round((counts.trainable + unused) / 1e6, 2) == without_hypernets
    assert counts.frozen == counts.total - counts.trainable


def test_parts_are_those_of_the_published_small_model() -> None:
    run = load_config(preset="small_enwik8", overrides=["model.vocab_size=204"])
    with torch.device("meta"):
        model = TransformerXL(run.model, run.moe, seed=1)
    parts = {"experts": 0, "attention": 0}
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parts["experts"] += parameter.numel()
        if ".attention." in name:
            parts["attention"] += parameter.numel()
    assert {part: round(count / 1e6, 2) for part, count in parts.items()} == {
        "experts": 16.83,
        "attention": 2.62,
    }
    assert round(parameter_counts(model).frozen / 1e6, 2) == 4.49
