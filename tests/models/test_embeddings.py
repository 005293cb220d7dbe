import pytest
import torch
from torch.testing import assert_close

from megamoe.errors import ConfigError
from megamoe.models.embeddings import AdaptiveEmbedding, vocabulary_clusters
from tests.models.builders import VOCABULARY, small_config

IDS = torch.tensor([[0, 12, 5, 4], [9, 3, 10, 5]])


def drawn(**changes: object) -> AdaptiveEmbedding:
    module = AdaptiveEmbedding(small_config(**changes))
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module.double()


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        ({}, [8]),
        ({"cutoffs": (4, 10)}, [8]),
        ({"d_embed": 6}, [6]),
        ({"cutoffs": (4, 10), "div_val": 2}, [8, 4, 2]),
        ({"cutoffs": (4, 10), "div_val": 2, "d_embed": 12}, [12, 6, 3]),
    ],
)
def test_looks_up_projects_and_scales(changes: dict[str, object], widths: list[int]) -> None:
    module = drawn(**changes)
    assert [weight.shape[1] for weight in module.weights] == widths
    tables = [
        weight @ module.projections[i].T if len(module.projections) else weight
        for i, weight in enumerate(module.weights)
    ]
    whole = torch.cat(tables)
    assert whole.shape == (VOCABULARY, 8)
    assert_close(module(IDS), whole[IDS] * 8**0.5)


def test_tables_without_tokens_get_a_zero_gradient() -> None:
    module = drawn(cutoffs=(4, 10), div_val=2)
    module(torch.tensor([[1, 2]])).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert module.weights[0].grad.abs().sum() > 0
    assert module.weights[2].grad.abs().sum() == 0


def test_refuses_what_leaves_no_vocabulary_or_width() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 0: "):
        vocabulary_clusters(small_config(vocab_size=0))
    with pytest.raises(ConfigError, match=r"model\.div_val = 3: leaves the last of 3 clusters no width"):
        vocabulary_clusters(small_config(cutoffs=(4, 10), div_val=3))
