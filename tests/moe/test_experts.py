import pytest
import torch

from megamoe.moe.exchange import LocalExchange
from megamoe.moe.experts import Experts
from tests.oracles import moe as oracle

SIZES = {"n_experts": 4, "d_model": 16, "d_expert": 24}


def build(local=range(4), dropout=0.0, dtype=torch.float32, **changes):
    sizes = SIZES | changes
    experts = Experts(**sizes, dropout=dropout, init_std=0.3, seed=7, layer=2, local=local)
    torch.nn.init.normal_(experts.b_in, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(experts.b_out, generator=torch.Generator().manual_seed(2))
    return experts.to(dtype)


def test_an_expert_is_the_same_whoever_holds_it():
    whole = Experts(**SIZES, dropout=0.0, init_std=0.3, seed=7, layer=2, local=range(4))
    part = Experts(**SIZES, dropout=0.0, init_std=0.3, seed=7, layer=2, local=range(2, 4))
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name][2:])


def test_experts_layers_and_seeds_start_differently():
    draws = [
        Experts(**SIZES, dropout=0.0, init_std=0.3, seed=seed, layer=layer, local=range(4)).w_in[expert]
        for seed, layer, expert in [(7, 2, 0), (7, 2, 1), (7, 3, 0), (8, 2, 0)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_initial_values():
    experts = Experts(8, 64, 128, dropout=0.0, init_std=0.05, seed=1, layer=0, local=range(8))
    assert experts.w_in.std().item() == pytest.approx(0.05, rel=0.02)
    assert experts.w_out.std().item() == pytest.approx(0.05, rel=0.02)
    assert torch.count_nonzero(experts.b_in) == torch.count_nonzero(experts.b_out) == 0
    assert experts.w_in.shape == (8, 128, 64)
    assert experts.w_out.shape == (8, 64, 128)


def test_responses_are_outputs_without_dropout(monkeypatch):
    monkeypatch.setattr("megamoe.moe.experts.RESPONSES_AT_ONCE", 3)
    experts = build(dropout=0.5, local=range(2, 4))
    x_ND = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    found = experts.responses(x_ND, lambda y: y.norm(dim=1))
    ones_N1 = torch.ones(7, 1)
    for e in range(2):
        expected = oracle.mixture(x_ND, torch.full((7, 1), e), ones_N1, *experts.weights).norm(dim=1)
        torch.testing.assert_close(found[:, e], expected.detach())


def test_outputs_of_choices():
    experts = build(dtype=torch.float64)
    x_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)).double()
    ids_TK = torch.tensor([[0, 3], [-1, 2], [1, 1], [-1, -1], [2, 0]])
    exchange = LocalExchange()
    arrived = exchange.dispatch(x_TD, ids_TK, None, 4, None)
    outputs_TKD = exchange.bring_choices_home(experts.outputs(arrived), arrived)
    for place in range(2):
        ids_T1 = ids_TK[:, place : place + 1]
        expected = oracle.mixture(x_TD, ids_T1, torch.ones(5, 1).double(), *experts.weights)
        torch.testing.assert_close(outputs_TKD[:, place], expected)
