import math

import pytest
import torch

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.errors import ConfigError
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.losses import balance_loss, load_shares, z_loss
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routing import Routing
from megamoe.moe.selection import top_k_softmax
from tests.oracles import moe as oracle


def routed(n_tokens=24, n_experts=4, top_k=2, seed=0):
    logits_TE = torch.randn(
        n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    return logits_TE, top_k_softmax(logits_TE, top_k)


def config(**changes):
    return MoEConfig(n_experts=4, router=RouterConfig(name="smoe"), **changes)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_equals_its_equation(top_k):
    logits_TE, routing = routed(top_k=top_k)
    expected = oracle.balance_loss(logits_TE.softmax(1).tolist(), routing.expert_ids_TK.tolist())
    assert balance_loss(logits_TE, load_shares(routing, 4)).item() == pytest.approx(expected, rel=1e-6)


def test_balance_loss_is_one_at_balance_and_e_at_collapse():
    even = Routing(torch.arange(8)[:, None] % 4, torch.ones(8, 1))
    assert balance_loss(torch.zeros(8, 4), load_shares(even, 4)).item() == pytest.approx(1)
    collapsed = Routing(torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    logits_TE = torch.tensor([60.0, 0, 0, 0]).expand(8, 4)
    assert balance_loss(logits_TE, load_shares(collapsed, 4)).item() == pytest.approx(4)


def test_mean_of_the_ranks_equals_the_global_batch_exactly():
    logits_TE, routing = routed(n_tokens=32)
    whole, _ = auxiliary_loss([routing], config(balance_loss=1.0), ONE_RANK.mean)
    (gradient,) = torch.autograd.grad(whole, logits_TE)
    halves = [logits_TE.detach()[:16].requires_grad_(), logits_TE.detach()[16:].requires_grad_()]
    routings = [top_k_softmax(half, 2) for half in halves]
    mean = torch.stack([load_shares(routing, 4) for routing in routings]).mean(0, keepdim=True)
    losses = [auxiliary_loss([routing], config(balance_loss=1.0), lambda _: mean)[0] for routing in routings]
    assert (sum(losses) / 2).item() == pytest.approx(whole.item(), rel=1e-6)
    gradients = torch.autograd.grad(sum(losses) / 2, halves)
    torch.testing.assert_close(torch.cat(gradients), gradient)


def test_balance_loss_pushes_the_crowded_expert_down():
    logits_TE = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 8, requires_grad=True)
    balance_loss(logits_TE, load_shares(top_k_softmax(logits_TE, 1), 4)).backward()
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_z_loss_equals_its_equation():
    logits_TE, _ = routed()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits_TE.tolist()) / 24
    assert z_loss(logits_TE).item() == pytest.approx(expected, rel=1e-6)


def test_layers_are_averaged_and_weighted():
    routings = [routed(seed=seed)[1] for seed in range(3)]
    total, raw = auxiliary_loss(routings, config(balance_loss=0.5, z_loss=0.25), ONE_RANK.mean)
    balance = sum(balance_loss(r.logits_TE, load_shares(r, 4)).item() for r in routings) / 3
    z = sum(z_loss(r.logits_TE).item() for r in routings) / 3
    assert {name: value.item() for name, value in raw.items()} == pytest.approx({"balance": balance, "z": z})
    assert total.item() == pytest.approx(0.5 * balance + 0.25 * z)


def test_ranks_talk_once_and_only_for_the_balance_loss():
    calls = []

    def mean(values):
        calls.append(values.shape)
        return values

    routings = [routed(seed=seed)[1] for seed in range(3)]
    auxiliary_loss(routings, config(z_loss=1.0), mean)
    assert calls == []
    auxiliary_loss(routings, config(balance_loss=1.0), mean)
    assert calls == [(3, 4)]


@pytest.mark.parametrize("routings", [[], [routed()[1]]])
def test_nothing_in_force_is_zero(routings):
    total, raw = auxiliary_loss(routings, config(), ONE_RANK.mean)
    assert total.item() == 0
    assert raw == {}


@pytest.mark.parametrize("field", ["balance_loss", "z_loss"])
def test_refuses_a_loss_on_logits_that_do_not_exist(field):
    routing = Routing(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    moe = MoEConfig(n_experts=4, router=RouterConfig(name="dense"), **{field: 0.1})
    with pytest.raises(ConfigError, match=f"moe.{field} = 0.1: set it to 0, policy 'dense' has no logits"):
        auxiliary_loss([routing], moe, ONE_RANK.mean)
