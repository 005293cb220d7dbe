import pytest
import torch
from torch.testing import assert_close

from megamoe.errors import ConfigError
from megamoe.serve.sampling import Sampler, draw
from megamoe.serve.settings import Settings

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.3, -4.0])
N_DRAWS = 100_000


def shares(temperature: float, top_p: float) -> torch.Tensor:
    """How often each token is drawn by numbers that are evenly spread."""
    uniform = (torch.arange(N_DRAWS, dtype=torch.double) + 0.5) / N_DRAWS
    ids = draw(LOGITS.expand(N_DRAWS, -1), uniform, temperature, top_p)
    return ids.bincount(minlength=len(LOGITS)) / N_DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert_close(shares(temperature, 1.0), expected, atol=2 / N_DRAWS, rtol=0)


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.6, [2]), (0.75, [2, 0]), (0.97, [0, 2, 3, 1])])
def test_the_nucleus_is_the_fewest_that_reach_the_sum(top_p: float, nucleus: list[int]) -> None:
    p = LOGITS.softmax(0)
    expected = torch.zeros_like(p).index_copy(0, torch.tensor(nucleus), p[nucleus])
    assert p[nucleus].sum() >= top_p
    assert p[nucleus].sum() - p[nucleus].min() < top_p
    assert_close(shares(1.0, top_p), expected / expected.sum(), atol=2 / N_DRAWS, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1e-300, 1.0), (1.0, 1e-9)])
def test_the_most_probable_token_alone(temperature: float, top_p: float) -> None:
    sampler = Sampler(Settings(temperature=temperature, top_p=top_p), [(b"a", 0), (b"b", 0)])
    for _ in range(20):
        assert sampler(LOGITS.expand(2, -1)).tolist() == [2, 2]


def test_a_row_draws_alone_as_among_others() -> None:
    rows = [(b"a", 0), (b"a", 1), (b"b", 0)]

    def drawn(rows: list[tuple[bytes, int]], seed: int = 0) -> torch.Tensor:
        sampler = Sampler(Settings(seed=seed), rows)
        return torch.stack([sampler(LOGITS.expand(len(rows), -1)) for _ in range(40)], dim=1)

    together = drawn(rows)
    for row, drawn_alone in zip(rows, together, strict=True):
        assert torch.equal(drawn([row])[0], drawn_alone)
    assert len({tuple(row.tolist()) for row in [*together, *drawn(rows, seed=1)]}) == 6


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", 0, "k = 0: give a number above 0"),
        ("samples", 0, "samples = 0: give a number above 0"),
        ("max_new_tokens", -1, "max_new_tokens = -1: give a number above 0"),
        ("temperature", -0.1, "temperature = -0.1: give 0, "),
        ("temperature", float("nan"), "temperature = nan: give 0, "),
        ("temperature", float("inf"), "temperature = inf: give 0, "),
        ("top_p", 0.0, "top_p = 0.0: give a number above 0, at most 1"),
        ("top_p", 1.5, "top_p = 1.5: give a number above 0, at most 1"),
        ("seed", -1, "seed = -1: give a number from 0 to "),
    ],
)
def test_refusals(name: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Settings(**{name: value})
