"""Token embeddings, one table or, for large vocabularies, narrower ones for rarer symbols.

Adaptive input (Baevski & Auli, ICLR 2019, arXiv 1809.10853): the cut-offs divide the vocabulary, sorted
by frequency, into clusters; cluster i is d_embed / div_val^i wide and projected to the model's width.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from megamoe.config.schema import ModelConfig
from megamoe.errors import ConfigError


class Cluster(NamedTuple):
    """Symbols `start` to `stop` - 1, embedded with `width` numbers each."""

    start: int
    stop: int
    width: int

    @property
    def size(self) -> int:
        """How many symbols it holds."""
        return self.stop - self.start


def vocabulary_clusters(model: ModelConfig) -> list[Cluster]:
    """The clusters that `model.cutoffs` and `model.div_val` describe; one without cut-offs.

    Raises:
        ConfigError: the vocabulary is unknown, or the last cluster has no width left.
    """
    if model.vocab_size == 0:
        raise ConfigError("model.vocab_size = 0: set it to the number of symbols of the data")
    edges = (0, *model.cutoffs, model.vocab_size)
    widest = model.d_embed or model.d_model
    clusters = [
        Cluster(start, stop, widest // model.div_val**i) for i, (start, stop) in enumerate(pairwise(edges))
    ]
    if clusters[-1].width == 0:
        raise ConfigError(
            f"model.div_val = {model.div_val}: leaves the last of {len(clusters)} clusters no width,"
            f" give less or drop a model.cutoffs"
        )
    return clusters


def vocabulary_tables(model: ModelConfig) -> list[Cluster]:
    """The tables that hold the clusters: one for all where they are equally wide, else one for each."""
    clusters = vocabulary_clusters(model)
    if model.div_val == 1:
        return [Cluster(0, model.vocab_size, clusters[0].width)]
    return clusters


def needs_projections(model: ModelConfig) -> bool:
    """Whether embeddings are projected to the model's width."""
    return model.div_val > 1 or model.d_embed not in (0, model.d_model)


class AdaptiveEmbedding(nn.Module):
    """Embedding of token ids, projected to width D and multiplied by sqrt(D).

    Attributes:
        weights: one table [size, width] per entry of `vocabulary_tables`.
        projections: one [D, width] per table; none where the width is D throughout.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.tables = vocabulary_tables(model)
        self.d_model = model.d_model
        self.weights = nn.ParameterList(torch.empty(table.size, table.width) for table in self.tables)
        projected = self.tables if needs_projections(model) else []
        self.projections = nn.ParameterList(torch.empty(model.d_model, table.width) for table in projected)

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Look up `ids_BS`, [B, S, D]."""
        if len(self.tables) == 1:
            x_BSD = self._look_up(0, ids_BS)
        else:
            x_BSD = self._look_up_by_cluster(ids_BS.flatten()).view(*ids_BS.shape, -1)
        return x_BSD * self.d_model**0.5

    def _look_up(self, table: int, ids: torch.Tensor) -> torch.Tensor:
        x = embedding(ids - self.tables[table].start, self.weights[table])
        return linear(x, self.projections[table]) if len(self.projections) else x

    def _look_up_by_cluster(self, ids_T: torch.Tensor) -> torch.Tensor:
        # Clusters without tokens take part too, so that their gradient is zero and not missing.
        positions = [
            ((ids_T >= table.start) & (ids_T < table.stop)).nonzero().flatten() for table in self.tables
        ]
        found = torch.cat([self._look_up(i, ids_T[where]) for i, where in enumerate(positions)])
        return found[torch.cat(positions).argsort()]
