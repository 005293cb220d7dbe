"""The order in which a rank sends its tokens, next to the oracle, without other ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.parallel.exchange import Order
from tests.oracles.exchange import sent


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Experts of up to 6 tokens, -1 for none; experts on each rank; ranks."""
    n_local, n_ranks, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    expert = st.integers(-1, n_local * n_ranks - 1)
    tokens = st.lists(st.lists(expert, min_size=top_k, max_size=top_k), max_size=6)
    return draw(tokens), n_local, n_ranks


@settings(max_examples=200, deadline=None)
@given(choices())
def test_what_is_sent_is_what_the_oracle_sends(case: tuple[list[list[int]], int, int]) -> None:
    ids, n_local, n_ranks = case
    top_k = len(ids[0]) if ids else 1
    ids_TK = torch.tensor(ids, dtype=torch.long).view(len(ids), top_k)
    expected = sent(ids, n_local, n_ranks)

    order = Order.of(ids_TK, n_local, n_ranks)
    assert order.sent_R2.tolist() == [[len(tokens), len(places)] for tokens, places in expected]
    order = order.without_unnamed(sum(len(places) for _, places in expected))
    travelling = [token for tokens, _ in expected for token in tokens]
    assert order.copies(len(travelling), *ids_TK.shape).token_N.tolist() == travelling
    pairs = list(zip(order.choice_Q.tolist(), order.code_Q.tolist(), strict=True))
    assert pairs == [pair for _, places in expected for pair in places]
