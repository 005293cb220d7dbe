"""The output layer: losses and logits over the vocabulary, plain or adaptive.

Adaptive softmax (Grave et al., ICML 2017, arXiv 1609.04309): the head scores the symbols of the first
cluster and one class for each further cluster; such a tail scores its own symbols, so that

    log p(y) = log p_head(y)                          y in the first cluster
    log p(y) = log p_head(class i) + log p_i(y)       y in cluster i

and only tokens of cluster i pay for its tail. Without cut-offs there is no tail and the head is the
plain softmax.

Shapes: T tokens, D model width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.config.schema import ModelConfig
from megamoe.models.cross_entropy import linear_cross_entropy
from megamoe.models.embeddings import needs_projections, vocabulary_clusters, vocabulary_tables
from megamoe.moe.precision import at_least_fp32


class Scorer(NamedTuple):
    """Logits of one cluster (and of the tails' classes in the head), from a projection [D, width] if any."""

    weight: torch.Tensor
    bias: torch.Tensor
    projection: torch.Tensor | None

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, symbols] in fp32 or wider."""
        return at_least_fp32(linear(self._project(hidden_TD), self.weight, self.bias))

    def losses(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [T] of the symbols or classes `targets_T`, in fp32 or wider."""
        return linear_cross_entropy(self._project(hidden_TD), self.weight, self.bias, targets_T)

    def _project(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return hidden_TD if self.projection is None else hidden_TD @ self.projection


class AdaptiveSoftmax(nn.Module):
    """Scores hidden states with the embedding's tables, or with its own where weights are not tied.

    Attributes:
        weights: [size, width] per table; none where they are tied to the embedding's.
        biases: [size] per table.
        projections: [D, width] per cluster that has its own: all, or the head alone where those of
            the tails are tied to the embedding's; none where the width is D throughout.
        cluster_weight, cluster_bias: scores of the tails' classes in the head; absent without tails.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.clusters = vocabulary_clusters(model)
        tables = vocabulary_tables(model)
        own = [] if model.tie_weights else tables
        self.weights = nn.ParameterList(torch.empty(table.size, table.width) for table in own)
        self.biases = nn.ParameterList(torch.empty(table.size) for table in tables)
        projected = self.clusters if needs_projections(model) else []
        if model.tie_projections:
            projected = projected[:1]
        self.projections = nn.ParameterList(torch.empty(model.d_model, c.width) for c in projected)
        n_tails = len(self.clusters) - 1
        if n_tails:
            self.cluster_weight = nn.Parameter(torch.empty(n_tails, self.clusters[0].width))
            self.cluster_bias = nn.Parameter(torch.empty(n_tails))

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        targets_BS: torch.Tensor | None,
        embedding_weights: Sequence[torch.Tensor],
        embedding_projections: Sequence[torch.Tensor],
        *,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Score every position.

        Args:
            hidden_BSD: output of the last layer.
            targets_BS: the symbols that follow; None computes no losses.
            embedding_weights: the embedding's tables, for tied weights.
            embedding_projections: the embedding's projections, for tied projections.
            return_logits: whether to score the whole vocabulary too, which costs what the tails save.

        Returns:
            losses [B, S] in nats at the places of their tokens, or None; logits [B, S, V] (log
            probabilities where there are tails), or None. Both fp32 or wider.
        """
        hidden_TD = hidden_BSD.flatten(0, -2)
        scorers = self._scorers(embedding_weights, embedding_projections)
        loss_BS = logits_BSV = None
        if targets_BS is not None:
            loss_BS = self._losses(scorers, hidden_TD, targets_BS.flatten()).view_as(targets_BS)
        if return_logits:
            logits_BSV = self._all_logits(scorers, hidden_TD).view(*hidden_BSD.shape[:-1], -1)
        return loss_BS, logits_BSV

    def _scorers(
        self, embedding_weights: Sequence[torch.Tensor], embedding_projections: Sequence[torch.Tensor]
    ) -> list[Scorer]:
        weights = self._by_cluster(self.weights if len(self.weights) else embedding_weights)
        biases = self._by_cluster(self.biases)
        if len(self.clusters) > 1:
            weights[0] = torch.cat([weights[0], self.cluster_weight])
            biases[0] = torch.cat([biases[0], self.cluster_bias])
        projections: list[torch.Tensor | None] = list(self.projections) or [None] * len(self.clusters)
        for i in range(len(projections), len(self.clusters)):
            projections.append(embedding_projections[min(i, len(embedding_projections) - 1)])
        return [Scorer(*parts) for parts in zip(weights, biases, projections, strict=True)]

    def _by_cluster(self, tables: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        first, *others = tables
        return [first, *others] if others else [*first.split([cluster.size for cluster in self.clusters])]

    def _losses(
        self, scorers: list[Scorer], hidden_TD: torch.Tensor, targets_T: torch.Tensor
    ) -> torch.Tensor:
        cluster_T = torch.zeros_like(targets_T)
        for cluster in self.clusters[1:]:
            cluster_T += targets_T >= cluster.start
        n_classes = len(scorers[0].bias)
        head_targets_T = torch.where(cluster_T == 0, targets_T, n_classes - cluster_T)
        loss_T = scorers[0].losses(hidden_TD, head_targets_T)
        # Tails without tokens take part too, so that their gradient is zero and not missing.
        for i, cluster in enumerate(self.clusters[1:], start=1):
            where = (cluster_T == i).nonzero().flatten()
            tail_loss = scorers[i].losses(hidden_TD[where], targets_T[where] - cluster.start)
            loss_T = loss_T.index_add(0, where, tail_loss)
        return loss_T

    def _all_logits(self, scorers: list[Scorer], hidden_TD: torch.Tensor) -> torch.Tensor:
        head_logits = scorers[0](hidden_TD)
        if len(self.clusters) == 1:
            return head_logits
        head = head_logits.log_softmax(dim=-1)
        tails = [
            head[:, -i, None] + scorer(hidden_TD).log_softmax(dim=-1)
            for i, scorer in enumerate(scorers[1:], start=1)
        ]
        return torch.cat([head[:, : self.clusters[0].size], *tails], dim=-1)
