from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megamoe.checkpoint.load import load_model, load_tokenizer
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.convert.neutral import open_neutral
from megamoe.models.reference_names import our_names
from tests.convert.published import FOLDER, NAMES, arrays, convert_golden, facts
from tests.convert.tool import run_tool

FILES = [*((name, "model.pt") for name in NAMES), ("hyperrouter_tiny", "model_noattr.pt")]


@pytest.fixture(scope="module", params=FILES, ids="/".join)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name, model = request.param
    return name, convert_golden(name, tmp_path_factory.mktemp("converted") / "out", model)


def test_losses_and_memories_at_every_k(converted: tuple[str, Path]) -> None:
    name, folder = converted
    model, golden = load_model(folder), arrays(name)
    for k in facts(name)["k_list"]:
        memory = None
        for segment, (data, target) in enumerate(zip(golden["data"], golden["target"], strict=True)):
            with torch.no_grad():
                output = model(data.T, target.T, memory, top_k=k or None)
            memory = output.memory
            assert_close(output.loss_BS.T, golden[f"k{k}/loss"][segment], atol=1e-5, rtol=0)
            # The published program also remembers the last layer's output, which nothing reads.
            published = golden[f"k{k}/mems_seg{segment}"][:-1].transpose(1, 2)
            assert_close(torch.stack(memory), published, atol=1e-5, rtol=0)


def test_moments_are_those_of_the_optimizer(converted: tuple[str, Path]) -> None:
    name, folder = converted
    optimizer = torch.load(FOLDER / name / "optimizer.pt", weights_only=True)
    tensors, config, state = open_neutral(folder)
    ours = our_names(facts(name)["state_dict"], config.model)
    found = {(tensor.kind, tensor.name): tensor.load() for tensor in tensors}
    order = facts(name)["trainable_in_optimizer_order"]
    assert len(order) == len(optimizer["state"])
    for number, published in enumerate(order):
        for kind in ("exp_avg", "exp_avg_sq"):
            expected = optimizer["state"][number][kind]
            assert torch.equal(
                found.pop((kind, ours[published])), expected.view_as(found["weight", ours[published]])
            )
    assert not [key for key in found if key[0].startswith("exp")]
    assert (state.step, state.engine.optimizer_step, state.tokens_seen) == (20, 20, 20 * 3 * 6)


def test_config_and_vocabulary(converted: tuple[str, Path]) -> None:
    name, folder = converted
    reader, published = CheckpointReader(folder), facts(name)["config"]
    reader.verify()
    model, moe = reader.config.model, reader.config.moe
    assert (model.n_layers, model.d_model, model.n_heads, model.d_head) == (2, 8, 2, 4)
    assert (model.segment_len, model.memory_len, model.dropout, model.tie_weights) == (6, 6, 0.0, True)
    assert reader.config.optimizer.lr == 2.5e-4
    assert load_tokenizer(folder).decode([0, 1]) == bytes(int(symbol) for symbol in facts(name)["vocab"][:2])
    if published["moe"]:
        assert (moe.layers, moe.n_experts, moe.d_expert, moe.top_k) == ("0,1", 4, 16, 2)
        assert moe.router.name == ("hyper" if published["hyper_size"] else "smoe_dropout")
    else:
        assert (moe.layers, model.d_inner) == ("none", 16)


def test_refuses_another_models_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = FOLDER / "hyperrouter_tiny/model.pt", FOLDER / "dense_tiny/optimizer.pt"
    assert run_tool("from-reference", model, tmp_path / "out", "--optimizer", optimizer) == 2
    assert "is for 26 parameters, the model trains 28" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.vocab_size=12",
            "embedding.weights.0: shape [11, 8], but the config's model has shape [12, 8]",
        ),
        ("model.n_layers=3", "missing, but the config's model has it"),
        ("model.tie_weights=false", ""),
        ("model.colour=3", "unknown key"),
    ],
)
def test_settings_must_fit_the_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    code = run_tool("from-reference", FOLDER / "dense_tiny/model.pt", tmp_path / "out", "--set", setting)
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "no list of text"), ('["a"]', "1 different symbols"), ("[", "read")]
)
def test_refuses_another_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_text(text)
    assert run_tool("from-reference", FOLDER / "dense_tiny/model.pt", tmp_path / "out", "--vocab", vocab) == 2
    assert message in capsys.readouterr().err
