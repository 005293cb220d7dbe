import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.moe.exchange import LocalExchange, SortedChoices

EXCHANGE = LocalExchange()


def combine(rows_ND, weights_TK, dispatched):
    return dispatched.choices.weighted_sum(EXCHANGE.bring_home(rows_ND, dispatched), weights_TK)


@st.composite
def choices(draw):
    """Expert ids [T, K] and E: any mix of experts and of -1, repeats included."""
    n_experts = draw(st.integers(1, 6))
    n_choices = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, n_experts - 1), min_size=n_choices, max_size=n_choices)
    rows = draw(st.lists(row, min_size=1, max_size=12))
    return torch.tensor(rows), n_experts


@settings(max_examples=80, deadline=None)
@given(choices())
def test_each_choice_reaches_its_expert_exactly_once(drawn):
    ids_TK, n_experts = drawn
    x_TD = torch.arange(len(ids_TK), dtype=torch.float32)[:, None]
    dispatched = EXCHANGE.dispatch(x_TD, ids_TK, n_experts)
    wanted = sorted((e, t) for t, row in enumerate(ids_TK.tolist()) for e in row if e >= 0)
    received = [
        (expert, int(token))
        for expert, rows in enumerate(dispatched.rows_ND.split(dispatched.counts))
        for token in rows.flatten()
    ]
    assert len(dispatched.counts) == n_experts
    assert received == wanted


@settings(max_examples=80, deadline=None)
@given(choices())
def test_numbers_go_along_with_the_rows(drawn):
    ids_TK, n_experts = drawn
    x_TD = torch.arange(len(ids_TK), dtype=torch.float32)[:, None]
    dispatched = EXCHANGE.dispatch(x_TD, ids_TK, n_experts)
    values_T = torch.arange(len(ids_TK)) * 2**40 + 7
    sent_N = EXCHANGE.send_along(values_T, dispatched)
    assert sent_N.tolist() == [int(token) * 2**40 + 7 for token in dispatched.rows_ND.flatten()]


@settings(max_examples=80, deadline=None)
@given(choices(), st.sampled_from([torch.float32, torch.float64]))
def test_identity_experts_return_the_input_times_the_sum_of_weights(drawn, dtype):
    ids_TK, n_experts = drawn
    generator = torch.Generator().manual_seed(ids_TK.sum().item() + 99)
    x_TD = torch.randn(len(ids_TK), 3, generator=generator, dtype=dtype, requires_grad=True)
    weights_TK = (torch.rand(ids_TK.shape, generator=generator, dtype=dtype) * (ids_TK >= 0)).requires_grad_()
    dispatched = EXCHANGE.dispatch(x_TD, ids_TK, n_experts)
    y_TD = combine(dispatched.rows_ND, weights_TK, dispatched)
    torch.testing.assert_close(y_TD, x_TD * weights_TK.sum(1, keepdim=True))
    upstream_TD = torch.randn(x_TD.shape, generator=generator, dtype=dtype)
    y_TD.backward(upstream_TD)
    torch.testing.assert_close(x_TD.grad, upstream_TD * weights_TK.sum(1, keepdim=True))
    agreement_T1 = (upstream_TD * x_TD).sum(1, keepdim=True).detach()
    torch.testing.assert_close(weights_TK.grad, agreement_T1 * (ids_TK >= 0))


def test_weights_that_sum_to_one_return_the_input():
    x_TD = torch.randn(64, 16)
    ids_TK = torch.randn(64, 8).topk(3).indices
    dispatched = EXCHANGE.dispatch(x_TD, ids_TK, 8)
    y_TD = combine(dispatched.rows_ND, torch.randn(64, 3).softmax(1), dispatched)
    torch.testing.assert_close(y_TD, x_TD)


def test_no_choice_at_all_gives_zeros_with_a_gradient():
    x_TD = torch.randn(4, 3, requires_grad=True)
    dispatched = EXCHANGE.dispatch(x_TD, torch.full((4, 2), -1), 5)
    y_TD = combine(dispatched.rows_ND, torch.zeros(4, 2), dispatched)
    y_TD.sum().backward()
    assert dispatched.counts == [0] * 5
    assert torch.equal(y_TD, torch.zeros(4, 3))
    assert torch.equal(x_TD.grad, torch.zeros(4, 3))


def test_sums_in_fp32_where_rows_have_16_bits():
    """In bf16, 256 + 1 is 256: adding a hundred ones to it would be lost one by one."""
    ids_TK = torch.arange(101)[None]
    choices = SortedChoices.of(ids_TK, 101)
    rows_ND = torch.ones(101, 1, dtype=torch.bfloat16)
    weights_TK = torch.ones(1, 101).index_fill(1, torch.tensor([0]), 256.0)
    assert choices.weighted_sum(rows_ND, weights_TK).item() == 356.0
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    choices.gather(x_TD).backward(weights_TK.T.bfloat16())
    assert x_TD.grad.item() == 356.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_type_of_the_rows(dtype):
    x_TD = torch.randn(5, 4, dtype=dtype)
    ids_TK = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    dispatched = EXCHANGE.dispatch(x_TD, ids_TK, 3)
    assert dispatched.rows_ND.dtype == dtype
    assert combine(dispatched.rows_ND, torch.rand(5, 2), dispatched).dtype == dtype


def test_weights_and_their_gradient_keep_fp32_where_rows_have_16_bits():
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(6, 64, generator=generator).bfloat16()
    upstream_TD = torch.randn(2, 64, generator=generator).bfloat16()
    weights_TK = torch.rand(2, 3, generator=generator).requires_grad_()
    choices = SortedChoices.of(torch.arange(6).view(2, 3), 6)
    choices.weighted_sum(rows_ND, weights_TK).backward(upstream_TD)
    expected = torch.einsum("tkd,td->tk", rows_ND.view(2, 3, 64).double(), upstream_TD.double())
    torch.testing.assert_close(weights_TK.grad.double(), expected, atol=1e-5, rtol=1e-5)
