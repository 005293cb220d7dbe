import math

import pytest
import torch
from torch.nn.functional import layer_norm

from megamoe.config.load import load_config
from megamoe.config.schema import RouterConfig
from megamoe.errors import ConfigError
from megamoe.moe.routers import available, build_router, resolve_options, router_class
from megamoe.moe.routing import LayerSpec, Router, RouterContext

SIZES = {"d_model": 8, "n_experts": 4, "layer": 0, "seed": 0, "init_std": 0.02}


def build(name, d_model=8, n_experts=4, layer=0, seed=0, init_std=0.02, **options):
    spec = LayerSpec(d_model=d_model, n_experts=n_experts, layer=layer, seed=seed, init_std=init_std)
    return build_router(RouterConfig(name=name, options=options), spec)


def context(top_k=2, step=0, seed=3, **changes):
    return RouterContext(step=step, seed=seed, top_k=top_k, **changes)


def routes(router, x_TD, top_k=2, step=0):
    return router(x_TD, context(top_k, step, token_ids_T=torch.arange(len(x_TD)) % 7))


def test_the_policies_of_megamoe_are_registered():
    assert {"hyper", "smoe", "smoe_dropout", "dense"} <= set(available())


@pytest.mark.parametrize("name", available())
def test_every_policy_says_what_it_is(name):
    cls = router_class(name)
    assert issubclass(cls, Router)
    assert cls.summary
    assert cls.paper


@pytest.mark.parametrize(
    "router, message",
    [
        (RouterConfig(name="hiper"), "moe.router.name = 'hiper': unknown policy, did you mean 'hyper'?"),
        (
            RouterConfig(options={"hypersize": 64}),
            "moe.router.hypersize = 64: unknown key, did you mean 'hyper_size'?",
        ),
        (
            RouterConfig(name="smoe", options={"hyper_size": 64}),
            "moe.router.hyper_size = 64: unknown key, there are none to choose from, leave it out",
        ),
        (RouterConfig(options={"hyper_size": "a"}), "moe.router.hyper_size = 'a': expected a whole number"),
        (RouterConfig(options={"hyper_size": 0}), "moe.router.hyper_size = 0: give a number above 0"),
        (
            RouterConfig(name="dense", options={"drop": 1}),
            "moe.router.drop = 1.0: give a probability in [0, 1)",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(router, message):
    with pytest.raises(ConfigError) as error:
        build_router(router, LayerSpec(**SIZES))
    assert str(error.value) == message


def test_options_reach_the_module():
    assert build("hyper").hypernet_w_in.shape == (256, 8)
    assert build("hyper", hyper_size=64).hypernet_w_in.shape == (64, 8)
    assert build("dense", drop=0.25).options.drop == 0.25
    run = load_config(preset="small_enwik8_h64", overrides=["moe.router.hyper_size=6"])
    assert resolve_options(run.moe.router).hyper_size == 6
    assert build_router(run.moe.router, LayerSpec(**SIZES)).hypernet_w_out.shape == (36, 6)


@pytest.mark.parametrize(
    "name, options, entropy, std",
    [
        ("hyper", {"hyper_size": 256}, 2.245, 0.072),
        ("hyper", {"hyper_size": 64}, 2.603, 0.036),
        ("smoe", {}, 2.725, 0.02),
    ],
)
def test_published_statistics_at_the_start(name, options, entropy, std):
    x_TD = layer_norm(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), (256,))
    entropies, stds = [], []
    for seed in range(12):
        router = build(name, d_model=256, n_experts=16, seed=seed, **options)
        log_p_TE = routes(router, x_TD).logits_TE.log_softmax(1)
        entropies.append(-(log_p_TE.exp() * log_p_TE).sum(1).mean().item())
        weight_ED = router.generate()[0] if name == "hyper" else router.weight
        stds.append(weight_ED.std().item())
    assert sum(entropies) / 12 == pytest.approx(entropy, abs=0.06)
    assert sum(stds) / 12 == pytest.approx(std, rel=0.1)


def test_hyper_trains_its_embedding_alone():
    router = build("hyper", init_std=0.3)
    assert [name for name, _ in router.named_parameters()] == ["embedding"]
    assert {name for name, _ in router.named_buffers()} == {
        "hypernet_w_in", "hypernet_b_in", "hypernet_w_out", "hypernet_b_out",
    }  # fmt: skip
    routes(router, torch.randn(9, 8)).weights_TK.square().sum().backward()
    assert torch.count_nonzero(router.embedding.grad) == 8
    assert set(router.state_dict()) == {"embedding", *dict(router.named_buffers())}


def test_hyper_embedding_starts_at_unit_variance():
    assert build("hyper", d_model=4096, n_experts=1, hyper_size=1).embedding.std().item() == pytest.approx(
        1, abs=0.05
    )


def test_hyper_generates_its_router_anew_in_evaluation():
    router = build("hyper").eval()
    x_TD = torch.randn(5, 8)
    before = routes(router, x_TD).logits_TE
    router.embedding.data.mul_(2)
    assert not torch.allclose(routes(router, x_TD).logits_TE, before)


def test_smoe_learns_and_smoe_dropout_does_not():
    learned, frozen = build("smoe", seed=4), build("smoe_dropout", seed=4)
    assert {name for name, _ in learned.named_parameters()} == {"weight", "bias"}
    assert not list(frozen.parameters())
    assert {name for name, _ in frozen.named_buffers()} == {"weight", "bias"}
    assert torch.equal(learned.weight, frozen.weight)
    x_TD = torch.randn(6, 8, requires_grad=True)
    routes(frozen, x_TD).weights_TK[:, 0].sum().backward()
    assert torch.count_nonzero(x_TD.grad) > 0


@pytest.mark.parametrize("name", ["hyper", "smoe", "smoe_dropout"])
def test_routes_in_fp32_when_parameters_have_16_bits(name):
    router = build(name, init_std=0.5)
    for parameter in router.parameters():
        parameter.data = parameter.data.bfloat16()
    routing = routes(router, torch.randn(30, 8).bfloat16())
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert all(buffer.dtype == torch.float32 for buffer in router.buffers())
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(30))


def test_dense_takes_every_expert_whatever_k():
    routing = routes(build("dense"), torch.randn(3, 8), top_k=1)
    assert routing.expert_ids_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(routing.weights_TK, torch.ones(3, 4))


def test_dense_drops_one_mask_per_step_in_training():
    router, x_TD = build("dense", n_experts=16, drop=0.5), torch.randn(5, 8)
    masks = {}
    for step in range(200):
        routing = routes(router, x_TD, step=step)
        assert (routing.expert_ids_TK == routing.expert_ids_TK[0]).all()
        assert torch.equal(routing.weights_TK, (routing.expert_ids_TK >= 0).float())
        masks[step] = tuple(routing.weights_TK[0].tolist())
    assert len(set(masks.values())) > 190
    assert sum(map(sum, masks.values())) / (200 * 16) == pytest.approx(0.5, abs=0.03)
    assert tuple(routes(router, x_TD, step=7).weights_TK[0].tolist()) == masks[7]
    other_layer = build("dense", n_experts=16, drop=0.5, layer=1)
    assert tuple(routes(other_layer, x_TD, step=7).weights_TK[0].tolist()) != masks[7]
    assert routes(router.eval(), x_TD).weights_TK.min() == 1


def test_dense_always_keeps_one():
    router = build("dense", drop=0.99)
    kept = [routes(router, torch.randn(1, 8), step=step).weights_TK.sum().item() for step in range(300)]
    assert min(kept) == 1
    assert sum(kept) / 300 < 1.1


PACKAGE = """
from dataclasses import dataclass
import torch
from megamoe.moe.routing import Router, Routing

class FirstRouter(Router):
    summary = "everything to expert 0"
    paper = "none"

    @dataclass(frozen=True)
    class Options:
        scale: float = 1.0

    def forward(self, x_TD, context):
        ids_T1 = torch.zeros(len(x_TD), 1, dtype=torch.long)
        return Routing(ids_T1, torch.full(ids_T1.shape, self.options.scale))

not_a_router = 3
"""


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    (tmp_path / "their_routers.py").write_text(PACKAGE)
    info = tmp_path / "their_routers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-routers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[megamoe.routers]\nfirst = their_routers:FirstRouter\n"
        "broken = their_routers:Missing\nwrong = their_routers:not_a_router\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_other_packages_bring_policies(other_package):
    assert "first" in available()
    router = build("first", scale="0.5")
    assert routes(router, torch.randn(2, 8)).weights_TK.tolist() == [[0.5], [0.5]]
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        build("first", scael=1)


def test_packages_are_searched_once_and_not_in_every_step(monkeypatch):
    available()
    monkeypatch.setattr("megamoe.moe.routers.registry.entry_points", None)
    assert "hyper" in available()


@pytest.mark.parametrize(
    "name, reason", [("broken", "cannot be imported"), ("wrong", "is not a megamoe Router")]
)
def test_a_broken_package_is_named(other_package, name, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        build(name)
    assert "\n" not in str(error.value)
    assert f"moe.router.name = {name!r}: their_routers:" in str(error.value)


def test_uniform_logits_spread_evenly():
    router = build("smoe")
    router.weight.data.zero_()
    routing = routes(router, torch.randn(3, 8), top_k=4)
    torch.testing.assert_close(routing.weights_TK, torch.full((3, 4), 0.25))
    assert routing.logits_TE.logsumexp(1)[0].item() == pytest.approx(math.log(4))
