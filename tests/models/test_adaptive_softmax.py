import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from megamoe.models.adaptive_softmax import AdaptiveSoftmax
from megamoe.models.embeddings import AdaptiveEmbedding
from tests.models.builders import VOCABULARY, small_config

CUTOFFS = (4, 10)
VARIANTS = {
    "plain": {},
    "plain, untied": {"tie_weights": False},
    "plain, narrow": {"d_embed": 6},
    "adaptive": {"cutoffs": CUTOFFS},
    "adaptive, untied": {"cutoffs": CUTOFFS, "tie_weights": False},
    "adaptive, narrow": {"cutoffs": CUTOFFS, "d_embed": 6},
    "adaptive, narrow, projections tied": {"cutoffs": CUTOFFS, "d_embed": 6, "tie_projections": True},
    "divided": {"cutoffs": CUTOFFS, "div_val": 2},
    "divided, projections tied": {"cutoffs": CUTOFFS, "div_val": 2, "tie_projections": True},
    "divided, narrow, untied": {"cutoffs": CUTOFFS, "div_val": 2, "d_embed": 4, "tie_weights": False},
}


class Vocabulary(nn.Module):
    """An embedding and the output layer that may share its tables, with drawn values in double."""

    def __init__(self, changes: dict[str, object]) -> None:
        super().__init__()
        self.config = small_config(**changes)
        self.embedding = AdaptiveEmbedding(self.config)
        self.output = AdaptiveSoftmax(self.config)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.double()

    def forward(
        self, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor | None, return_logits: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weights, projections = list(self.embedding.weights), list(self.embedding.projections)
        return self.output(hidden_BSD, targets_BS, weights, projections, return_logits=return_logits)


def log_probability(vocabulary: Vocabulary, hidden_D: torch.Tensor, target: int) -> torch.Tensor:
    """log p(target) from the definition, one symbol at a time."""
    config, output = vocabulary.config, vocabulary.output
    edges = [0, *config.cutoffs, VOCABULARY]
    tables = vocabulary.embedding.weights if config.tie_weights else output.weights
    n_clusters = len(edges) - 1

    def projected(cluster: int) -> torch.Tensor:
        if config.div_val == 1 and config.d_embed in (0, config.d_model):
            return hidden_D
        if config.tie_projections and cluster > 0:
            shared = vocabulary.embedding.projections
            return shared[cluster if config.div_val > 1 else 0].T @ hidden_D
        return output.projections[cluster].T @ hidden_D

    def score(symbol: int, cluster: int) -> torch.Tensor:
        table, row = (cluster, symbol - edges[cluster]) if config.div_val > 1 else (0, symbol)
        return tables[table][row] @ projected(cluster) + output.biases[table][row]

    def log_softmax(scores: list[torch.Tensor], chosen: int) -> torch.Tensor:
        return scores[chosen] - torch.log(sum(torch.exp(score) for score in scores))

    cluster = sum(target >= edge for edge in edges[1:-1])
    head = [score(symbol, 0) for symbol in range(edges[1])]
    for column in range(n_clusters - 1):
        head.append(output.cluster_weight[column] @ projected(0) + output.cluster_bias[column])
    if cluster == 0:
        return log_softmax(head, target)
    tail = [score(symbol, cluster) for symbol in range(edges[cluster], edges[cluster + 1])]
    # The published form counts the columns of the tails from the end.
    return log_softmax(head, -cluster) + log_softmax(tail, target - edges[cluster])


def hidden_of(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, length, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition(variant: str) -> None:
    vocabulary = Vocabulary(VARIANTS[variant])
    targets_BS = torch.randperm(14, generator=torch.Generator().manual_seed(2)).view(2, 7) % VOCABULARY
    hidden_BSD = hidden_of(2, 7)
    expected = -torch.stack(
        [
            log_probability(vocabulary, hidden, target)
            for hidden, target in zip(hidden_BSD.flatten(0, 1), targets_BS.flatten().tolist(), strict=True)
        ]
    ).view(2, 7)
    loss_BS, logits_BSV = vocabulary(hidden_BSD, targets_BS, return_logits=True)
    assert_close(loss_BS, expected)
    log_probabilities = logits_BSV.log_softmax(dim=-1)
    assert_close(-log_probabilities.gather(-1, targets_BS[..., None])[..., 0], expected)

    weighting = torch.linspace(1, 2, 14, dtype=torch.float64).view(2, 7)
    names, parameters = zip(*vocabulary.named_parameters(), strict=True)
    ours = torch.autograd.grad((loss_BS * weighting).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weighting).sum(), parameters, allow_unused=True)
    for name, gradient, other in zip(names, ours, theirs, strict=True):
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.allclose(gradient, other), name


def test_probabilities_of_an_adaptive_vocabulary_sum_to_one() -> None:
    _, logits_BSV = Vocabulary(VARIANTS["divided"])(hidden_of(2, 3), None, return_logits=True)
    assert logits_BSV.shape == (2, 3, VOCABULARY)
    assert_close(logits_BSV.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_tails_without_tokens_get_a_zero_gradient() -> None:
    vocabulary = Vocabulary(VARIANTS["divided, narrow, untied"])
    loss_BS, _ = vocabulary(hidden_of(1, 3), torch.tensor([[0, 3, 1]]))
    loss_BS.sum().backward()
    assert all(parameter.grad is not None for parameter in vocabulary.output.parameters())
    assert vocabulary.output.weights[1].grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "divided"])
def test_losses_are_fp32_whatever_the_model(variant: str, dtype: torch.dtype) -> None:
    vocabulary = Vocabulary(VARIANTS[variant])
    hidden_BSD, targets_BS = hidden_of(1, 4), torch.tensor([[0, 5, 12, 7]])
    exact, _ = vocabulary(hidden_BSD, targets_BS)
    rounded, logits = vocabulary.to(dtype)(hidden_BSD.to(dtype), targets_BS, return_logits=True)
    assert rounded.dtype == logits.dtype == torch.float32
    assert_close(rounded.double(), exact.detach(), atol=0.2, rtol=0.05, check_dtype=False)


def test_a_uniform_head_costs_the_log_of_the_vocabulary() -> None:
    vocabulary = Vocabulary({})
    for parameter in vocabulary.parameters():
        parameter.data.zero_()
    loss_BS, _ = vocabulary(hidden_of(1, 2), torch.tensor([[0, 12]]))
    assert loss_BS.tolist() == [[pytest.approx(math.log(VOCABULARY))] * 2]
