"""Every method on whole models: the function at keep = 1, planted experts, and what is left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.compressed import CompressedReader, open_reader
from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.compress.methods import compress
from megamoe.compress.settings import Settings
from megamoe.compress.source import Source
from megamoe.config.schema import RouterConfig
from megamoe.errors import CheckpointError, ConfigError
from megamoe.models.transformer_xl import TransformerXL
from tests.checkpoint.small import model_of, write_model
from tests.compress.experts import permuted_copies
from tests.convert.dense import logits
from tests.convert.tool import convert

EXACT_AT_1: list[dict[str, Any]] = [
    {"method": "resmoe", "residual": "prune"},
    {"method": "resmoe", "residual": "svd"},
    {"method": "svd"},
    {"method": "prune"},
    {"method": "merge"},
    {"method": "drop"},
]
OF_DESIGN = EXACT_AT_1[:4]


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(settings.values())


@pytest.fixture(scope="module")
def source(trained: Path) -> Source:
    return Source(trained, max_tokens=500)


@pytest.fixture(scope="module")
def before(trained: Path) -> torch.Tensor:
    return logits(load_model(trained))


@pytest.mark.parametrize("settings", EXACT_AT_1, ids=name_of)
def test_all_is_kept_at_1(
    source: Source, before: torch.Tensor, tmp_path: Path, settings: dict[str, Any]
) -> None:
    losses = compress(source, Settings(keep=1, **settings), tmp_path / "out")
    assert all(loss.lost < 1e-12 for loss in losses.values())
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [*OF_DESIGN, {"method": "merge"}], ids=name_of)
def test_every_mode_and_the_restored_checkpoint_compute_the_same(
    source: Source, before: torch.Tensor, tmp_path: Path, settings: dict[str, Any]
) -> None:
    compress(source, Settings(keep=0.5, **settings), tmp_path / "out")
    reader = open_reader(tmp_path / "out")
    assert isinstance(reader, CompressedReader)
    assert ("factored" in reader.compression.modes) == ("svd" in settings.values())
    dense = logits(load_model(tmp_path / "out"))
    assert (dense - before).abs().max() > 1e-3
    for mode in reader.compression.modes[1:]:
        found = logits(load_model(tmp_path / "out", experts=mode))
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    convert("from-compressed", tmp_path / "out", tmp_path / "neutral")
    assert torch.equal(logits(load_model(tmp_path / "neutral")), dense)
    assert CheckpointReader(tmp_path / "neutral").state == reader.state


def test_planted_experts_are_their_barycenter(tmp_path: Path) -> None:
    config, model = model_of(model={"init_std": 0.2})
    experts = model.moe_layers[0].experts
    orders = permuted_copies(torch.arange(experts.w_in.shape[1])[:, None], len(experts.w_in))[:, :, 0]
    with torch.no_grad():
        for expert, order_F in enumerate(orders):
            experts.w_in[expert] = experts.w_in[0][order_F]
            experts.b_in[expert] = experts.b_in[0][order_F]
            experts.w_out[expert] = experts.w_out[0][:, order_F]
    write_model(tmp_path / "planted", config, model)
    settings = Settings(method="resmoe", keep=0.01)
    (loss,) = compress(Source(tmp_path / "planted"), settings, tmp_path / "out").values()
    assert loss.residual < 1e-14
    before, after = (logits(load_model(tmp_path / name)) for name in ("planted", "out"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_what_is_lost_is_what_the_weights_differ_by(source: Source, tmp_path: Path) -> None:
    losses = compress(source, Settings(method="svd", keep=0.3), tmp_path / "out")
    old, new = (load_model(path).state_dict() for path in (source.path, tmp_path / "out"))
    for layer, loss in losses.items():
        names = [f"layers.{layer}.moe.experts.{leaf}" for leaf in ("w_in", "b_in", "w_out")]
        lost = sum((old[name] - new[name]).square().sum() for name in names)
        total = sum(old[name].square().sum() for name in names)
        assert loss.lost == pytest.approx(float(lost / total), rel=1e-4)
        assert loss.residual == 1
    untouched = [name for name in old if not name.endswith(("w_in", "b_in", "w_out"))]
    assert all(torch.equal(old[name], new[name]) for name in untouched)


def test_a_residual_loses_less_than_the_plain_expert_at_the_same_keep(source: Source, tmp_path: Path) -> None:
    for residual in ("prune", "svd"):
        centred = compress(
            source, Settings(method="resmoe", residual=residual, keep=0.25), tmp_path / residual
        )
        plain = compress(source, Settings(method=residual, keep=0.25), tmp_path / f"plain {residual}")
        assert all(centred[layer].lost < plain[layer].lost for layer in plain)


def test_dropping_leaves_a_smaller_model_with_the_rows_of_the_kept(source: Source, tmp_path: Path) -> None:
    compress(source, Settings(method="drop", keep=0.5, by="frequency"), tmp_path / "out")
    model, dense = load_model(tmp_path / "out"), load_model(source.path)
    assert (model.moe_config.n_experts, model.moe_config.router.name) == (2, "smoe")
    for layer, former in zip(model.moe_layers, dense.moe_layers, strict=True):
        choices_E = source.usage[layer.layer].choices_E
        kept = choices_E.argsort(descending=True, stable=True)[:2].sort().values
        weight_ED, bias_E = former.router.generate()
        assert torch.equal(layer.router.weight, weight_ED[kept])
        assert torch.equal(layer.router.bias, bias_E[kept])
        assert torch.equal(layer.experts.w_in, former.experts.w_in[kept])
    assert open_reader(tmp_path / "out").state.step == 0


def test_usage_is_what_the_router_chooses(source: Source) -> None:
    model = load_model(source.path)
    for layer, used in source.usage.items():
        n_experts = len(model.moe_layers[layer].experts.w_in)
        assert used.choices_E.shape == used.contribution_E.shape == (n_experts,)
        assert used.choices_E.sum() % source.config.moe.top_k == 0
        assert ((used.contribution_E > 0) == (used.choices_E > 0)).all()
        assert used.products_EE is not None and torch.equal(used.products_EE, used.products_EE.T)


@pytest.mark.parametrize(
    ("moe", "method", "problem"),
    [
        ({"layers": "none"}, "resmoe", "there are no experts to compress"),
        ({"router": RouterConfig(name="topk")}, "svd", "its layers have no experts to compress"),
        ({"router": RouterConfig(name="switch")}, "drop", "--method drop is for hyper, smoe, smoe_dropout"),
    ],
)
def test_models_that_a_method_is_not_for_are_refused(
    tmp_path: Path, moe: dict[str, Any], method: str, problem: str
) -> None:
    config, _ = model_of()
    config = replace(config, moe=replace(config.moe, **moe))
    write_model(tmp_path / "in", config, TransformerXL(config.model, config.moe, seed=0))
    with pytest.raises(CheckpointError, match=problem):
        compress(Source(tmp_path / "in"), Settings(method=method, keep=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_needs_scores(source: Source, tmp_path: Path) -> None:
    config = replace(source.config, moe=replace(source.config.moe, router=RouterConfig(name="hash")))
    model = TransformerXL(config.model, config.moe, seed=0)
    write_model(tmp_path / "in", config, model, tokenizer=source.state.tokenizer)
    with pytest.raises(CheckpointError, match=r"^moe\.router\.name = 'hash': gives experts no scores"):
        compress(Source(tmp_path / "in", max_tokens=100), Settings(method="merge"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_is_above_0_and_at_most_1(keep: float) -> None:
    with pytest.raises(ConfigError, match=r"^--keep = .*: give a fraction above 0, at most 1$"):
        Settings(method="svd", keep=keep)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config, model = model_of()
    with torch.no_grad():
        model.moe_layers[0].experts.b_in[1, 2] = float("nan")
    write_model(tmp_path / "in", config, model)
    with pytest.raises(CheckpointError, match=r"^layers\.1\.moe\.experts\.b_in: holds numbers"):
        compress(Source(tmp_path / "in"), Settings(method="resmoe", keep=0.5), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
