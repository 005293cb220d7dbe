import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from megamoe.serve.sparsemax import sparsemax

INF = float("inf")


def project(z: list[float]) -> list[float]:
    """The nearest point of the simplex, by bisection of the shift."""
    low, high = min(z) - 1, max(z)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(max(value - middle, 0) for value in z) > 1:
            low = middle
        else:
            high = middle
    return [max(value - low, 0) for value in z]


def test_an_example_by_hand() -> None:
    assert_close(sparsemax(torch.tensor([1.0, 0.8, 0.1])), torch.tensor([0.6, 0.4, 0.0]))


def test_equal_scores_share() -> None:
    assert_close(sparsemax(torch.full((2, 5), 3.0)), torch.full((2, 5), 0.2))


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8))
def test_it_is_the_projection(z: list[float]) -> None:
    found = sparsemax(torch.tensor(z, dtype=torch.double))
    assert_close(found, torch.tensor(project(z), dtype=torch.double), atol=1e-9, rtol=0)
    assert_close(found.sum(), torch.tensor(1.0, dtype=torch.double))


def test_hidden_scores_are_as_if_they_were_not_there() -> None:
    z = torch.tensor([-INF, 0.3, -INF, 0.1, -2.0], requires_grad=True)
    assert_close(sparsemax(z)[[1, 3, 4]], sparsemax(z.detach()[[1, 3, 4]]))
    sparsemax(z)[1].backward()
    assert_close(z.grad, torch.tensor([0.0, 0.5, 0.0, -0.5, 0.0]))
