"""Tokens copied into rows and rows summed into tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.moe.copies import Copies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_sums_and_copies_are_those_of_a_loop(tokens: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    copies = Copies.of(torch.tensor(tokens, dtype=torch.long), 6)
    x_TD = torch.randn(6, 3, generator=generator, dtype=torch.double).requires_grad_()
    rows_ND, weights_N = torch.randn(len(tokens), 3, generator=generator).double(), torch.rand(len(tokens))
    assert torch.equal(copies.gather(x_TD), x_TD[tokens])
    expected = torch.zeros(6, 3, dtype=torch.double)
    plain = torch.zeros(6, 3, dtype=torch.double)
    for row_D, weight, token in zip(rows_ND, weights_N.double(), tokens, strict=True):
        expected[token] += weight * row_D
        plain[token] += row_D
    torch.testing.assert_close(copies.sum(rows_ND, weights_N), expected)
    torch.testing.assert_close(copies.sum(rows_ND), plain)
    copies.gather(x_TD).backward(rows_ND)
    torch.testing.assert_close(x_TD.grad, plain)


def test_sums_in_fp32_where_rows_have_16_bits() -> None:
    """In bf16, 256 + 1 is 256: adding a hundred ones to it would be lost one by one."""
    copies = Copies.of(torch.zeros(101, dtype=torch.long), 1)
    rows_ND = torch.ones(101, 1, dtype=torch.bfloat16)
    weights_N = torch.ones(101).index_fill(0, torch.tensor([0]), 256.0)
    assert copies.sum(rows_ND, weights_N).item() == 356.0
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    copies.gather(x_TD).backward(weights_N[:, None].bfloat16())
    assert x_TD.grad is not None and x_TD.grad.item() == 356.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_of_the_rows_stays(dtype: torch.dtype) -> None:
    copies = Copies.of(torch.tensor([0, 1, 1]), 2)
    assert copies.sum(torch.randn(3, 4).to(dtype), torch.rand(3)).dtype == dtype
    assert copies.gather(torch.randn(2, 4).to(dtype)).dtype == dtype
