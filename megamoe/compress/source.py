"""The checkpoint that is compressed, and what is found out about it once."""

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch

from megamoe.checkpoint.compressed import REPLACED
from megamoe.checkpoint.reader import locate
from megamoe.compress.barycenter import Barycenter, barycenter
from megamoe.compress.usage import Usage, measure_usage
from megamoe.convert.feed_forwards import model_tensors
from megamoe.convert.neutral import open_neutral
from megamoe.convert.tensors import LazyTensor
from megamoe.errors import CheckpointError, ConfigError
from megamoe.moe.neurons import design
from megamoe.moe.routers import router_class


class Source:
    """An open neutral checkpoint with experts.

    Args:
        path: a run folder, whose newest checkpoint is taken; or a ``step-*`` or ``best`` folder.
        overrides: where its validation text is and how it is read, see `megamoe.training.scoring.score`.
        max_tokens: of that text, read at most about this many; 0 reads all.

    Attributes:
        path: of the checkpoint.
        tensors: weights and buffers of its model.
        config: of its run.
        state: of its run.
        layers: its mixture layers.

    Raises:
        CheckpointError: there is no sound checkpoint, or it has no experts.
        ConfigError: `max_tokens` is below 0.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = (), max_tokens: int = 0) -> None:
        if max_tokens < 0:
            raise ConfigError(f"--max-tokens = {max_tokens}: give 0 or more")
        self.path = locate(path)
        self.overrides, self.max_tokens = list(overrides), max_tokens
        tensors, self.config, self.state = open_neutral(self.path)
        self.tensors = list(model_tensors(tensors))
        self.layers = self.config.moe.layer_indices(self.config.model.n_layers)
        if not self.layers:
            raise CheckpointError(
                f"moe.layers = {self.config.moe.layers!r}: there are no experts to compress"
            )
        name = self.config.moe.router.name
        if router_class(name).owns_feed_forward:
            raise CheckpointError(f"moe.router.name = {name!r}: its layers have no experts to compress")
        self._by_name = {tensor.name: tensor for tensor in self.tensors}

    def leaf(self, layer: int, name: str) -> torch.Tensor:
        """A stacked tensor of a layer's experts.

        Raises:
            CheckpointError: it holds numbers that are not finite.
        """
        tensor = self._by_name[f"layers.{layer}.moe.experts.{name}"]
        values = tensor.checked()
        if not values.isfinite().all():
            raise CheckpointError(f"{tensor.name}: holds numbers that are not finite")
        return values

    def designs(self, layer: int) -> torch.Tensor:
        """The design matrices of a layer's experts, [E, F, C] float64."""
        w_in_EFD, b_in_EF, w_out_EDF = (self.leaf(layer, name).double() for name in REPLACED)
        return design(w_in_EFD, b_in_EF, w_out_EDF)

    def apart_from(self, leaves: Sequence[str]) -> Iterator[LazyTensor]:
        """The model's tensors without these of its experts."""
        left_out = {f"layers.{layer}.moe.experts.{leaf}" for layer in self.layers for leaf in leaves}
        return (tensor for tensor in self.tensors if tensor.name not in left_out)

    @cache  # noqa: B019 (as long as the source)
    def barycenter(self, layer: int, n_starts: int) -> Barycenter:
        """That of a layer's experts."""
        return barycenter(self.designs(layer), n_starts)

    @cached_property
    def usage(self) -> dict[int, Usage]:
        """How much its experts are used on its validation text at `moe.top_k`, by layer."""
        return measure_usage(self.path, self.config.moe.top_k, self.overrides, self.max_tokens)
