"""The exchange within one process: nothing moves, and what stands where is said rightly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.moe.exchange import LocalExchange

EXCHANGE = LocalExchange()


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Expert ids [T, K] and E: any mix of experts and of -1, repeats included."""
    n_experts = draw(st.integers(1, 6))
    n_choices = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, n_experts - 1), min_size=n_choices, max_size=n_choices)
    rows = draw(st.lists(row, min_size=1, max_size=12))
    return torch.tensor(rows), n_experts


@settings(max_examples=80, deadline=None)
@given(choices())
def test_each_choice_reaches_its_expert_exactly_once(drawn: tuple[torch.Tensor, int]) -> None:
    ids_TK, n_experts = drawn
    keys_T = torch.arange(len(ids_TK)) * 2**40
    weights_TK = torch.rand(ids_TK.shape)
    arrived = EXCHANGE.dispatch(torch.rand(len(ids_TK), 3), ids_TK, weights_TK, n_experts, keys_T)
    assert arrived.weights_P is not None and arrived.keys_N is not None
    wanted = [
        (expert if expert >= 0 else n_experts, t, float(weights_TK[t, j]), t * 2**40)
        for t, row in enumerate(ids_TK.tolist())
        for j, expert in enumerate(row)
    ]
    keys_P = arrived.keys_N[arrived.token_P]
    columns = (arrived.expert_P, arrived.token_P, arrived.weights_P, keys_P)
    assert [*zip(*(column.tolist() for column in columns), strict=True)] == wanted


def test_rows_of_choices_come_home_in_fp32() -> None:
    ids_TK = torch.tensor([[0, 1], [2, -1]])
    arrived = EXCHANGE.dispatch(torch.rand(2, 3), ids_TK, None, 3, None)
    rows_PD = torch.arange(12.0).view(4, 3).bfloat16()
    assert torch.equal(EXCHANGE.bring_choices_home(rows_PD, arrived), torch.arange(12.0).view(2, 2, 3))
