"""A model whose experts stay in its checkpoint's files, of which some at a time are on the device."""

import math
import weakref
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from megamoe.checkpoint.compressed import CompressedReader
from megamoe.checkpoint.load import load_model, open_model
from megamoe.errors import ConfigError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.experts import Experts
from megamoe.moe.mixture import Choices, Weights, mix_fetched
from megamoe.parallel.device import Device
from megamoe.serve.budget import Budget
from megamoe.serve.loader import Loader
from megamoe.serve.replacement import POLICIES
from megamoe.serve.slots import ExpertSlots, Traffic
from megamoe.serve.stored_experts import StoredExperts

OF_EXPERTS = r"layers\.\d+\.moe\.experts\..*"
"""Names of the parameters that stay in the files."""


class OffloadedExperts(Experts):
    """`Experts` in slots, for evaluation: the same numbers, bit for bit, from any number of slots.

    Args:
        experts: those of the model, on the meta device.
        slots: of the layer.
    """

    def __init__(self, experts: Experts, slots: ExpertSlots) -> None:
        nn.Module.__init__(self)
        self.n_experts, self.local, self.dropout = experts.n_experts, experts.local, experts.dropout
        self.slots = slots
        self.eval()

    def compute(self, x_ND: torch.Tensor, choices: Choices, weights_P: torch.Tensor) -> torch.Tensor:
        """The weighted sum over the choices, [N, D], one expert after the other."""
        needed = choices.counts_E.nonzero().flatten().tolist()
        with self.slots.call(needed) as fetch:
            return mix_fetched(x_ND, choices, weights_P, fetch)

    def fetch(self, expert: int) -> Weights:
        """The parameters of an expert, until it is called again."""
        return self.slots.fetch(expert)

    def extra_repr(self) -> str:
        """Experts and slots, for print(model)."""
        return f"{self.n_experts} experts, {self.slots.n_slots} in slots"


class OffloadedModel:
    """A language model in evaluation mode, its mixture layers with slots.

    Args:
        path: as `load_model` takes it.
        budget: memory for the experts of all layers; the same number of slots for each.
        policy: a name in `POLICIES`.
        in_background: whether experts that are expected are loaded while others are computed.

    Attributes:
        model: a `TransformerXL` on the device.
        slots: of its mixture layers, from below.
        n_bytes: bytes of all slots.

    Raises:
        CheckpointError: see `load_model`.
        ConfigError: the budget has no room for an expert in each layer, there are none, or they are
            compressed.
    """

    def __init__(
        self, path: str | Path, budget: Budget, policy: str = "lru", *, in_background: bool = True
    ) -> None:
        reader = open_model(path)
        if isinstance(reader, CompressedReader):
            raise ConfigError(
                f"budget = {budget}: compressed experts cannot be read one by one; leave it out, or restore"
                " them with tools/convert_checkpoint.py from-compressed"
            )
        self.model: TransformerXL = load_model(reader.folder, without=OF_EXPERTS)
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, Experts)}
        stored = [StoredExperts(reader, name, experts) for name, experts in layers.items()]
        n_slots = slots_of_layer(budget, stored)
        loader = Loader() if in_background else None
        wake = None if loader is None else loader.wake
        device = torch.device(Device.detect().kind)
        self.slots = [ExpertSlots(experts, n_slots, POLICIES[policy](), device, wake) for experts in stored]
        for (name, experts), slots in zip(layers.items(), self.slots, strict=True):
            self.model.set_submodule(name, OffloadedExperts(experts, slots))
        self.model.to(device)
        self.n_bytes = sum(slots.n_slots * slots.stored.n_bytes for slots in self.slots)
        self._close = weakref.finalize(self, loader.close) if loader else lambda: None

    @property
    def traffic(self) -> Traffic:
        """That of all layers."""
        return sum((slots.traffic for slots in self.slots), Traffic())

    def close(self) -> None:
        """End the loading in the background; experts are loaded on demand from here on."""
        self._close()


def load_offloaded(path: str | Path, budget: Budget) -> TransformerXL:
    """The model of `path`, whose experts are loaded as they are needed; see `OffloadedModel`."""
    return OffloadedModel(path, budget, in_background=False).model


def slots_of_layer(budget: Budget, stored: Collection[StoredExperts]) -> int:
    """Slots that each layer gets: as many as fit, at most one for each expert.

    Raises:
        ConfigError: there is no room for one, or there are no experts.
    """
    if not stored:
        raise ConfigError(f"budget = {budget}: this model has no experts; leave it out")
    of_one_each = sum(experts.n_bytes for experts in stored)
    n_experts = max(experts.n_experts for experts in stored)
    n_slots = math.floor(budget.bytes_of(n_experts * of_one_each) / of_one_each)
    if n_slots < 1:
        raise ConfigError(
            f"budget = {budget}: no room for one expert in each of {len(stored)} layers; give at least"
            f" {of_one_each} bytes, or {1 / n_experts:.4g} of all experts"
        )
    return min(n_slots, n_experts)
