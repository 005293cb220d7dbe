import itertools

import pytest
import torch
from torch.nn.functional import linear

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.errors import ConfigError
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import token_keys
from megamoe.moe.routing import Router, RouterContext, Routing
from tests.oracles import moe as oracle

D, F = 6, 10


def context(top_k, step=0, n_tokens=0):
    keys_T = token_keys(5, step, range(1), n_tokens).flatten()
    return RouterContext(step=step, seed=5, top_k=top_k, token_keys_T=keys_T)


def build(policy="hyper", n_experts=4, dropout=0.0, d_model=D, d_expert=F, **options):
    moe = MoEConfig(
        n_experts=n_experts, d_expert=d_expert, top_k=1, router=RouterConfig(name=policy, options=options)
    )
    layer = MoELayer(d_model, moe, layer=1, seed=5, dropout=dropout, init_std=0.5)
    for bias in (layer.experts.b_in, layer.experts.b_out):
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(len(bias)))
    return layer


def tokens(n_tokens, d_model=D, seed=0):
    return torch.randn(1, n_tokens, d_model, generator=torch.Generator().manual_seed(seed))


def gradients(layer, x, top_k, step=0):
    """Output, routing and {name: gradient} for a fixed upstream gradient; `x` counts as a parameter."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y, routing = layer(x, context(top_k, step, x.shape[1]))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return y.detach(), routing, {"x": x.grad, **found}


def oracle_gradients(layer, x, top_k):
    leaves = {name: value.detach().double().clone() for name, value in layer.state_dict().items()}
    for name, _ in layer.named_parameters():
        leaves[name].requires_grad_()
    x_TD = x.detach().double()[0].clone().requires_grad_()
    router = {name[7:]: value for name, value in leaves.items() if name.startswith("router.")}
    if "embedding" in router:
        names = ("embedding", "hypernet_w_in", "hypernet_b_in", "hypernet_w_out", "hypernet_b_out")
        weight_ED, bias_E = oracle.generated_router(*(router[name] for name in names), layer.n_experts)
    else:
        weight_ED, bias_E = router["weight"], router["bias"]
    ids_TK, weights_TK = oracle.choose(x_TD, weight_ED, bias_E, top_k)
    stacks = (leaves[f"experts.{name}"] for name in ("w_in", "b_in", "w_out", "b_out"))
    y_TD = oracle.mixture(x_TD, ids_TK, weights_TK, *stacks)
    y_TD.backward(torch.linspace(-1, 1, y_TD.numel(), dtype=torch.double).view_as(y_TD))
    found = {name: leaves[name].grad for name, _ in layer.named_parameters()}
    return y_TD.detach()[None], ids_TK, {"x": x_TD.grad[None], **found}


def spread(layer, load):
    """Bend a linear router: `one` sends all tokens to expert 0, `starved` none to the last."""
    if load == "one":
        layer.router.bias.data[0] = 50.0
    if load == "starved":
        layer.router.bias.data[-1] = -50.0


GRID = [
    (n_tokens, n_experts, top_k, load)
    for n_tokens, n_experts, load in itertools.product((1, 2, 17), (1, 2, 5), ("even", "one", "starved"))
    for top_k in sorted({1, min(2, n_experts), n_experts})
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("n_tokens, n_experts, top_k, load", GRID)
def test_equals_the_double_loop(n_tokens, n_experts, top_k, load, dtype, tolerance):
    layer = build("smoe", n_experts).to(dtype)
    spread(layer, load)
    x = tokens(n_tokens).to(dtype)
    y, routing, ours = gradients(layer, x, top_k)
    expected_y, expected_ids, expected = oracle_gradients(layer, x, top_k)
    assert torch.equal(routing.expert_ids_TK.sort(1).values, expected_ids.sort(1).values)
    torch.testing.assert_close(y.double(), expected_y, atol=tolerance, rtol=tolerance)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        wanted = expected[name] if expected[name] is not None else torch.zeros_like(gradient).double()
        torch.testing.assert_close(gradient.double(), wanted, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("policy", ["hyper", "smoe_dropout"])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_other_policies_equal_the_double_loop(policy, top_k):
    layer = build(policy).double()
    x = tokens(9).double()
    y, _, ours = gradients(layer, x, top_k)
    expected_y, _, expected = oracle_gradients(layer, x, top_k)
    torch.testing.assert_close(y, expected_y, atol=1e-12, rtol=1e-12)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-12, msg=name)


def test_dense_equals_one_wide_network():
    layer = build("dense")
    x = tokens(11)
    w_in, b_in, w_out, b_out = (parameter.detach().double() for parameter in layer.experts.parameters())
    hidden = linear(x.double(), w_in.flatten(0, 1), b_in.flatten()).relu()
    wide = linear(hidden, w_out.permute(1, 0, 2).flatten(1), b_out.sum(0))
    torch.testing.assert_close(layer(x, context(1))[0].double(), wide, atol=1e-5, rtol=1e-5)


def test_bf16_equals_fp32_within_its_precision():
    layer = build("hyper", n_experts=8, d_model=32, d_expert=64)
    x = tokens(200, 32).bfloat16()
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16().float()
    y, routing, in_fp32 = gradients(layer, x.float(), 3)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    y_16, routing_16, in_16_bits = gradients(layer, x, 3)
    assert torch.equal(routing_16.logits_TE, routing.logits_TE)
    assert torch.equal(routing_16.weights_TK, routing.weights_TK)
    assert y_16.dtype == torch.bfloat16
    assert relative_error(y_16, y) < 0.005
    errors = {name: relative_error(gradient, in_fp32[name]) for name, gradient in in_16_bits.items()}
    assert max(errors.values()) < 0.04, errors


def relative_error(ours, expected):
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("policy", ["hyper", "smoe", "smoe_dropout"])
def test_autocast_leaves_routing_in_fp32(policy):
    layer, x = build(policy), tokens(20)
    _, plain = layer(x, context(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x, context(2))
    assert torch.equal(routing.logits_TE, plain.logits_TE)
    assert torch.equal(routing.expert_ids_TK, plain.expert_ids_TK)
    assert y.shape == x.shape


class CountingRouter(Router):
    """Random choices in training, to show that a recomputed step would route differently."""

    calls = 0

    def forward(self, x_TD, context):
        self.calls += 1
        logits_TE = torch.rand(len(x_TD), 4) + x_TD.sum(1, keepdim=True)
        top_TK, ids_TK = logits_TE.topk(context.top_k)
        return Routing(ids_TK, top_TK.softmax(1), logits_TE)


def test_checkpointing_changes_nothing_and_routes_once():
    x, results = tokens(30), []
    for checkpointing in (False, True):
        layer = build(dropout=0.3)
        layer.router = CountingRouter(layer.router.spec, None)
        layer.checkpoint_activations = checkpointing
        torch.manual_seed(3)
        y, _, found = gradients(layer, x, 2)
        results.append((y, found))
        assert layer.router.calls == 1
    (y, found), (y_again, found_again) = results
    assert torch.equal(y, y_again)
    assert all(torch.equal(found[name], found_again[name]) for name in found)


def test_checkpointing_keeps_fewer_bytes():
    def kept(checkpointing):
        layer = build(n_experts=8, d_expert=64)
        layer.checkpoint_activations = checkpointing
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            layer(tokens(64).requires_grad_(), context(4))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


def test_dropout_of_a_token_depends_on_no_other():
    layer, x = build(dropout=0.3), tokens(30)
    keys_T = token_keys(5, 0, range(1), 30).flatten()
    whole, _ = layer(x, RouterContext(step=0, seed=5, top_k=2, token_keys_T=keys_T))
    part, _ = layer(x[:, 12:20], RouterContext(step=0, seed=5, top_k=2, token_keys_T=keys_T[12:20]))
    torch.testing.assert_close(part, whole[:, 12:20])
    with pytest.raises(AssertionError, match="token_keys_T"):
        layer(x, RouterContext(step=0, seed=5, top_k=2))


@pytest.mark.parametrize("top_k", [0, 5])
def test_refuses_a_k_beyond_the_experts(top_k):
    with pytest.raises(ConfigError, match=f"top_k = {top_k}: give 1 to 4"):
        build()(tokens(3), context(top_k))


def test_keeps_the_shape_of_a_batch():
    layer = build()
    x = torch.randn(3, 5, D)
    y, routing = layer(x, context(2))
    assert y.shape == x.shape
    assert routing.expert_ids_TK.shape == (15, 2)
    alone, _ = layer(x[1:2], context(2))
    torch.testing.assert_close(alone, y[1:2])
