import json
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from megamoe import load_model
from megamoe.checkpoint.dtypes import torch_dtype
from megamoe.checkpoint.exported import CARD, SUMS, ExportReader
from megamoe.checkpoint.load import load_tokenizer
from megamoe.config.schema import RouterConfig
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.errors import CheckpointError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routers.registry import BUILT_IN
from megamoe.moe.routing import RouterContext
from tests.checkpoint.small import model_of, write_model
from tests.convert.dense import require_same_function
from tests.convert.tool import convert, run_tool

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    corpus = {"name": "enwik8-sample", "unit": "byte", "metric": "bpc", "is_sample": True}
    return write_model(
        tmp_path / "checkpoint", *model_of(model={"init_std": 0.3}), step=1234,
        tokenizer=ByteTokenizer().to_dict(), corpus=corpus, best_metric=1.25, best_step=1000,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["5GB", "5KB"])
def test_the_exported_model_is_the_model(tmp_path: Path, checkpoint: Path, size: str) -> None:
    convert("export", checkpoint, tmp_path / "exported", "--shard-size", size)
    files = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert ("model.safetensors.index.json" in files) == (size == "5KB")
    expected, found = load_model(checkpoint), load_model(tmp_path / "exported")
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(
        torch.equal(values, found.state_dict()[name]) for name, values in expected.state_dict().items()
    )
    require_same_function(expected, found)
    assert load_tokenizer(tmp_path / "exported").decode([104, 105]) == b"hi"


@pytest.mark.parametrize("router", BUILT_IN)
def test_the_exported_model_of_every_policy_is_the_model(tmp_path: Path, router: str) -> None:
    options = {"shared": True, "hyper_size": 8} if router == "hyper" else {}
    config, _ = model_of(model={"init_std": 0.3, "n_layers": 3}, moe={"layers": "all"})
    config = replace(config, moe=replace(config.moe, router=RouterConfig(name=router, options=options)))
    original = TransformerXL(config.model, config.moe, seed=1)
    write_model(tmp_path / "checkpoint", config, original)
    convert("export", tmp_path / "checkpoint", tmp_path / "exported")
    found = load_model(tmp_path / "exported")
    assert all(
        torch.equal(values, found.state_dict()[name]) for name, values in original.state_dict().items()
    )
    require_same_function(load_model(tmp_path / "checkpoint"), found)
    if router == "hyper":
        tensors = load_file(tmp_path / "exported" / "model.safetensors")
        for mixture in original.moe_layers:
            weight_ED, bias_E = mixture.router.generate()
            assert_close(tensors[mixture.router.spec.path("weight")], weight_ED.detach())
            assert_close(tensors[mixture.router.spec.path("bias")], bias_E.detach())


@pytest.mark.parametrize("router", ["hyper", "smoe", "smoe_dropout"])
def test_the_documents_ten_lines_compute_a_mixture_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    config, model = model_of(model={"init_std": 0.3})
    if router != "hyper":
        config = replace(config, moe=replace(config.moe, router=RouterConfig(name=router)))
        model = TransformerXL(config.model, config.moe, seed=1)
    write_model(tmp_path / "checkpoint", config, model)
    monkeypatch.chdir(tmp_path)
    convert("export", "checkpoint", "exported")
    [code] = re.findall(
        r"```python\n(.*?)```", DOCUMENT.read_text().partition("## Exported models")[2], re.DOTALL
    )
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    names: dict[str, object] = {}
    exec(code, names)
    (layer,) = load_model("exported").moe_layers
    x_TD = torch.randn(20, config.model.d_model, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 4):
        with torch.no_grad():
            y_BSD, _ = layer(x_TD[None], RouterContext(step=0, seed=0, top_k=k))
            assert_close(names["mixture"](x_TD, layer.layer, k), y_BSD[0], atol=1e-6, rtol=1e-5)  # type: ignore[operator]


def test_description_and_card(tmp_path: Path, checkpoint: Path) -> None:
    convert("export", checkpoint, tmp_path / "exported", "--dtype", "bf16")
    described = json.loads((tmp_path / "exported/config.json").read_text())
    assert (described["model_type"], described["architectures"]) == ("megamoe", ["TransformerXL"])
    assert described["torch_dtype"] == "bfloat16"
    card = (tmp_path / "exported/README.md").read_text()
    for fact in ("1,234", "1.2500 bpc at step 1,000", "enwik8-sample, a sample", "4 of hidden width 8"):
        assert fact in card
    assert len(card) < 2000


def test_cast_changes_weights_and_leaves_routers(tmp_path: Path, checkpoint: Path) -> None:
    convert("export", checkpoint, tmp_path / "fp32")
    convert("cast", tmp_path / "fp32", tmp_path / "bf16", "--dtype", "bf16")
    convert("export", checkpoint, tmp_path / "direct", "--dtype", "bf16")
    first, cast, direct = (ExportReader(tmp_path / name) for name in ("fp32", "bf16", "direct"))
    assert first.files == cast.files == direct.files
    for name in first.files:
        shape, dtype = cast.describe(name)
        assert dtype == ("float32" if ".router." in name else "bfloat16")
        values = cast.tensor(name, shape)
        assert torch.equal(values, first.tensor(name, shape).to(torch_dtype(dtype)))
        assert torch.equal(values, direct.tensor(name, shape))
    assert (cast.config, cast.state) == (first.config, first.state)
    assert next(load_model(tmp_path / "bf16").parameters()).dtype == torch.float32


def test_cast_refuses_what_does_not_fit(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("cast", checkpoint, tmp_path / "out", "--dtype", "bf16") == 2
    assert "is no exported model; write one with export --dtype bf16" in capsys.readouterr().err
    config, model = model_of()
    with torch.no_grad():
        model.embedding.weights[0][0, 0] = 1e6
    write_model(tmp_path / "large", config, model)
    assert run_tool("export", tmp_path / "large", tmp_path / "out", "--dtype", "fp16") == 2
    assert "embedding.weights.0: holds numbers beyond the range of float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hashes_are_compared_and_sha256sum_reads_them(tmp_path: Path, checkpoint: Path) -> None:
    exported = tmp_path / "exported"
    convert("export", checkpoint, exported, "--shard-size", "5KB")
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=exported, check=True, capture_output=True)
    (exported / CARD).write_text("of another hand")
    load_model(exported)
    for path in sorted(exported.iterdir()):
        if path.name != CARD:
            content = path.read_bytes()
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
            with pytest.raises(CheckpointError, match=SUMS):
                load_model(exported)
            path.write_bytes(content)
    (exported / SUMS).write_text((exported / SUMS).read_text().partition("\n")[2])
    with pytest.raises(CheckpointError, match=r"config\.json: is not listed in SHA256SUMS"):
        load_model(exported)
    (exported / SUMS).unlink()
    load_model(exported)


def rename_in_header(path: Path, old: str, new: str) -> None:
    """The same length, so that everything else stays where it is."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    path.write_bytes(data[:8] + data[8 : 8 + n].replace(old.encode(), new.encode()) + data[8 + n :])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"megamoe"', '"gpt2"', "model_type = 'gpt2'"),
        ("config.json", '"d_model": 16', '"d_model": 18', r"the config's model has"),
        ("config.json", '"n_experts": 4', '"n_experts": 40000000', "more than the weights"),
        ("config.json", '"state"', '"stat"', "incomplete"),
        ("config.json", '"step": 1234', '"step": "x"', "step = 'x'"),
        ("config.json", "{", "[", "not valid JSON"),
        ("tokenizer.json", "{", "", "JSON"),
        ("model.safetensors", "layers.0.attention.qkv", "layers.9.attention.qkv", "no such tensor|missing"),
    ],
)
def test_a_changed_export_is_refused(
    tmp_path: Path, checkpoint: Path, file: str, old: str, new: str, message: str
) -> None:
    convert("export", checkpoint, tmp_path / "exported")
    path = tmp_path / "exported" / file
    (tmp_path / "exported" / SUMS).unlink()
    if file == "model.safetensors":
        rename_in_header(path, old, new)
    else:
        path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "exported")


def test_an_index_may_not_point_elsewhere(tmp_path: Path, checkpoint: Path) -> None:
    convert("export", checkpoint, tmp_path / "exported", "--shard-size", "5KB")
    index = tmp_path / "exported/model.safetensors.index.json"
    (tmp_path / "exported" / SUMS).unlink()
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001', 1))
    with pytest.raises(CheckpointError, match="not the plain name"):
        load_model(tmp_path / "exported")
