from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.config.schema import RouterConfig
from megamoe.convert.neutral import open_neutral
from megamoe.models.transformer_xl import TransformerXL
from tests.checkpoint.small import model_of, write_model
from tests.convert.published import FOLDER, NAMES, convert_golden, facts
from tests.convert.tool import convert, run_tool


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_again_bit_for_bit(tmp_path: Path, name: str) -> None:
    first = convert_golden(name, tmp_path / "first")
    convert("to-reference", first, tmp_path / "published")
    model = torch.load(tmp_path / "published/model.pt", weights_only=True, mmap=True)
    shapes = facts(name)["state_dict"]
    assert list(model) == list(shapes)
    assert {key: list(tensor.shape) for key, tensor in model.items()} == shapes
    assert model["crit.out_layers.0.weight"].data_ptr() == model["word_emb.emb_layers.0.weight"].data_ptr()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.values())

    ours, theirs = (
        torch.load(path / "optimizer.pt", weights_only=True)
        for path in (tmp_path / "published", FOLDER / name)
    )
    for number, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][key], values) for key, values in state.items())
    # The published program sets the current rate anew in every step.
    assert ours["param_groups"] == [theirs["param_groups"][0] | {"lr": 2.5e-4}]

    published = tmp_path / "published"
    settings = ["moe.router.name=smoe_dropout"] if name == "smoe_dropout_tiny" else []
    convert(
        "from-reference", published / "model.pt", tmp_path / "second",
        "--optimizer", published / "optimizer.pt", "--set", "training.batch_size=3", *settings,
    )  # fmt: skip
    (a, *_), (b, *_) = open_neutral(first), open_neutral(tmp_path / "second")
    assert [(t.kind, t.name) for t in a] == [(t.kind, t.name) for t in b]
    assert all(torch.equal(x.load(), y.load()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        {"cutoffs": [4, 9], "div_val": 2, "tie_projections": True},
        {"cutoffs": [4, 9], "d_embed": 12, "tie_weights": False},
    ],
    ids=str,
)
def test_adaptive_tables_and_projections(tmp_path: Path, model: dict[str, object]) -> None:
    config, original = model_of(model=model)
    write_model(tmp_path / "ours", config, original)
    convert("to-reference", tmp_path / "ours", tmp_path / "published")
    assert not (tmp_path / "published/optimizer.pt").exists()
    settings = ["model.cutoffs=4,9", f"model.segment_len={config.model.segment_len}", "moe.top_k=2"]
    convert("from-reference", tmp_path / "published/model.pt", tmp_path / "back", "--set", *settings)
    found = load_model(tmp_path / "back")
    assert found.model_config.div_val == config.model.div_val
    assert found.model_config.tie_projections == config.model.tie_projections
    expected = original.state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in found.state_dict().items())


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            {"name": "switch"},
            "moe.router.name = 'switch': the published program has no such gate;",
        ),
        ({"shared": True, "hyper_size": 8}, "moe.router.shared = True: each published gate has its own"),
    ],
)
def test_a_router_without_counterpart_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], router: dict[str, object], message: str
) -> None:
    options = {key: value for key, value in router.items() if key != "name"}
    config, _ = model_of()
    moe = replace(config.moe, router=RouterConfig(name=str(router.get("name", "hyper")), options=options))
    config = replace(config, moe=moe)
    write_model(tmp_path / "ours", config, TransformerXL(config.model, config.moe, seed=1))
    assert run_tool("to-reference", tmp_path / "ours", tmp_path / "published") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "published").exists()
