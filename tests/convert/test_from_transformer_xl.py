from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megamoe.checkpoint.load import load_model
from tests.convert.published import FOLDER
from tests.convert.tool import convert, run_tool
from tests.models.goldens import Golden


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("name", "settings"), [
    ("dense_tiny", []),
    ("prelnorm_dense", ["model.pre_norm=true"]),
    ("adaptive_dense", ["model.cutoffs=10,30"]),
])  # fmt: skip
def test_losses_of_a_state_dict(tmp_path: Path, name: str, settings: list[str], prefix: str) -> None:
    golden = Golden("forward", name)
    tied = "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"
    state = golden.group("param/")
    state[tied[1]] = state[tied[0]]
    torch.save({f"{prefix}{key}": tensor for key, tensor in state.items()}, tmp_path / "state.pt")
    convert(
        "from-transformer-xl",
        tmp_path / "state.pt",
        tmp_path / "out",
        "--set",
        "model.memory_len=6",
        *settings,
    )
    model, memory = load_model(tmp_path / "out"), None
    assert model.model_config.tie_weights
    # The published adaptive softmax gives losses in another order; these are in that of the tokens.
    expected = golden.arrays.get("k0/loss_keep_order", golden.arrays["k0/loss"])
    for data, target, loss in zip(golden.arrays["data"], golden.arrays["target"], expected, strict=True):
        with torch.no_grad():
            output = model(data.T, target.T, memory)
        memory = output.memory
        assert_close(output.loss_BS.T, loss, atol=1e-5, rtol=0)


def test_a_whole_model(tmp_path: Path) -> None:
    convert("from-transformer-xl", FOLDER / "dense_tiny/model.pt", tmp_path / "out")
    assert load_model(tmp_path / "out").model_config.memory_len == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hyperrouter_tiny/model.pt", "from-reference"),
        ("dense_tiny/optimizer.pt", "no model and no state dict"),
    ],
)
def test_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert run_tool("from-transformer-xl", FOLDER / name, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cut_offs_that_the_file_does_not_hold_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Golden("forward", "adaptive_dense").group("param/"), tmp_path / "state.pt")
    assert run_tool("from-transformer-xl", tmp_path / "state.pt", tmp_path / "out") == 2
    assert "model.cutoffs" in capsys.readouterr().err
