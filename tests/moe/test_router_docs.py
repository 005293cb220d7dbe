"""docs/routers says what the policies are, and its example works as it stands."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.layer import MoELayer
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers import router_class
from megamoe.moe.routers.registry import BUILT_IN
from megamoe.moe.routing import RouterContext

DOCS = Path(__file__).parents[2] / "docs/routers"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_policy_has_a_page_with_its_options(name):
    page = (DOCS / f"{name}.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.MULTILINE))
    assert documented == {option.name: str(option.default) for option in fields(router_class(name).Options)}
    assert f"]({name}.md)" in (DOCS / "README.md").read_text()


def test_every_page_belongs_to_a_policy():
    assert {page.stem for page in DOCS.glob("*.md")} - {"README"} == set(BUILT_IN)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The package that docs/routers/README.md describes, installed."""
    text = (DOCS / "README.md").read_text()
    code, toml = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "toml"))
    (tmp_path / "my_routers.py").write_text(code)
    info = tmp_path / "my_routers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-routers\nVersion: 1.0\n")
    points = tomllib.loads(toml)["project"]["entry-points"]["megamoe.routers"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[megamoe.routers]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)


def test_the_example_trains_with_its_options_and_its_loss(example):
    router = RouterConfig(name="sigmoid", options={"scale": "2", "sparsity_loss": "0.5"})
    moe = MoEConfig(n_experts=4, d_expert=16, router=router)
    layer = MoELayer(8, moe, layer=0, seed=1, dropout=0.0, init_std=0.5)
    y, routing = layer(torch.randn(2, 50, 8), RouterContext(step=0, seed=1, top_k=2))
    total, raw = auxiliary_loss([routing, routing], moe, ONE_RANK.mean)
    assert layer.router.options.scale == 2
    torch.testing.assert_close(total, 0.5 * routing.weights_TK.mean())
    assert raw.keys() == {"sparsity"}
    (y.sum() + total).backward()
    assert torch.count_nonzero(layer.router.weight.grad) == 32


def test_a_loss_of_weight_zero_is_left_out(example):
    moe = MoEConfig(n_experts=4, d_expert=16, router=RouterConfig(name="sigmoid"))
    layer = MoELayer(8, moe, layer=0, seed=1, dropout=0.0, init_std=0.5)
    _, routing = layer(torch.randn(2, 5, 8), RouterContext(step=0, seed=1, top_k=2))
    total, raw = auxiliary_loss([routing], moe, ONE_RANK.mean)
    assert total.item() == 0
    assert raw == {}
