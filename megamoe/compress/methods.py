"""The methods by name, and a checkpoint compressed by one of them.

    resmoe  barycenter of the experts as they are best aligned, and pruned or low-rank residuals
    svd     truncated singular value decomposition of each expert's design matrix
    prune   the largest entries of each expert's design matrix
    merge   M-SMoE, one expert for each group
    drop    the most useful experts alone

Shapes: E experts, F hidden units, C numbers of a unit, D model width, G groups.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.checkpoint.compressed import CENTRE, REPLACED, Compression, Loss, stored_name
from megamoe.compress import drop
from megamoe.compress.barycenter import reordered
from megamoe.compress.merge import aligned_to, dominant_experts, group_means, groups_of
from megamoe.compress.source import Source
from megamoe.convert.feed_forwards import new_run
from megamoe.convert.neutral_writer import require_new, write_compressed, write_neutral
from megamoe.convert.tensors import LazyTensor, lazy
from megamoe.errors import ConfigError
from megamoe.moe.codings import LowRank, Pruned, Shared
from megamoe.moe.compressed import Compressed, restored

RESIDUALS: dict[str, type[Pruned] | type[LowRank]] = {"prune": Pruned, "svd": LowRank}
"""How a residual, or an expert itself, is coded."""
STARTS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        method: key of `METHODS`.
        keep: fraction in (0, 1] of the numbers of each residual or expert, or of the experts.
        residual: of resmoe, key of `RESIDUALS`.
        starts: of resmoe, starts of the search for the barycenter.
        by: of drop, one of `drop.RANKED_BY`.
    """

    method: str
    keep: float
    residual: str = "prune"
    starts: int = STARTS
    by: str = drop.RANKED_BY[0]

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"--keep = {self.keep}: give a fraction above 0, at most 1")
        if self.starts < 1:
            raise ConfigError(f"--starts = {self.starts}: give 1 or more")

    @property
    def name(self) -> str:
        """The method, with its residual where it has one."""
        return f"{self.method} ({self.residual})" if self.method == "resmoe" else self.method


# The experts in the order of units in which they are stored, [E, F, C] float64, and what is stored.
Encoded = tuple[torch.Tensor, Compressed]


def compress(source: Source, settings: Settings, folder: Path) -> dict[int, Loss]:
    """Write the checkpoint with its experts compressed: a compressed one, after `drop` a smaller neutral one.

    Holds the compressed experts of all layers and one layer's experts in double precision.

    Args:
        source: what to compress.
        settings: how.
        folder: where; it must not exist yet.

    Returns:
        What each layer has lost.

    Raises:
        CheckpointError: the folder exists, the policy is none that the method is for, or the experts hold
            numbers that are not finite. Nothing is left then.
    """
    require_new(folder)
    if settings.method == "drop":
        return _drop(source, settings, folder)
    layers, losses = {}, {}
    for layer in source.layers:
        designs_EFC, layers[layer] = METHODS[settings.method](source, layer, settings)
        losses[layer] = _loss(designs_EFC, layers[layer])
    centre_FC, coding, _ = layers[source.layers[0]]
    compression = Compression(settings.name, settings.keep, coding.NAME, centre_FC is not None, losses)
    tensors = [*source.apart_from((*REPLACED, "b_out"))]
    for layer, compressed in layers.items():
        tensors += _stored(layer, compressed)
    state = source.state.of_other_weights()
    write_compressed(folder, tensors, source.config, state, compression.to_json())
    return losses


def _resmoe(source: Source, layer: int, settings: Settings) -> Encoded:
    found = source.barycenter(layer, settings.starts)
    aligned_EFC = reordered(source.designs(layer), found.orders_EF)
    centre_FC = found.centre_FC.float()
    # Of the centre as it is stored, so that the residuals mend its rounding.
    coding = RESIDUALS[settings.residual].of(aligned_EFC - centre_FC, settings.keep)
    return aligned_EFC, Compressed(centre_FC, coding, source.leaf(layer, "b_out"))


def _plain(residual: str) -> Callable[[Source, int, Settings], Encoded]:
    def encode(source: Source, layer: int, settings: Settings) -> Encoded:
        designs_EFC = source.designs(layer)
        coding = RESIDUALS[residual].of(designs_EFC, settings.keep)
        return designs_EFC, Compressed(None, coding, source.leaf(layer, "b_out"))

    return encode


def _merge(source: Source, layer: int, settings: Settings) -> Encoded:
    used = source.usage[layer]
    dominant_G = dominant_experts(source.usage, settings.keep)[layer]
    groups_E = groups_of(used, dominant_G)
    aligned_EFC = aligned_to(source.designs(layer), dominant_G[groups_E])
    matrices_GFC = group_means(aligned_EFC, groups_E, used.frequency_E).float()
    b_out_GD = group_means(source.leaf(layer, "b_out").double(), groups_E, used.frequency_E).float()
    shape = (matrices_GFC.shape[1], matrices_GFC.shape[2])
    coding = Shared(shape, matrices=matrices_GFC, groups=groups_E)
    return aligned_EFC, Compressed(None, coding, b_out_GD[groups_E])


METHODS: dict[str, Callable[[Source, int, Settings], Encoded]] = {
    "resmoe": _resmoe, "svd": _plain("svd"), "prune": _plain("prune"), "merge": _merge,
}  # fmt: skip
"""All but `drop`, which makes a smaller model instead of coding one: a layer's experts, compressed."""


def _drop(source: Source, settings: Settings, folder: Path) -> dict[int, Loss]:
    drop.require_droppable(source.config)
    kept = drop.most_useful(source.usage, settings.keep, settings.by)
    losses = {}
    for layer, ids in kept.items():
        energies_E = source.designs(layer).square().sum((1, 2))
        losses[layer] = Loss(1.0, 1 - _share(energies_E[ids].sum(), energies_E.sum()))
    config = drop.config_without(source.config, len(kept[source.layers[0]]))
    write_neutral(folder, drop.tensors_without(source, kept), config, new_run(source.state))
    return losses


def _loss(designs_EFC: torch.Tensor, compressed: Compressed) -> Loss:
    centre_FC, coding, _ = compressed
    residuals_EFC = designs_EFC if centre_FC is None else designs_EFC - centre_FC
    total = designs_EFC.square().sum()
    lost_E = [
        (design_FC - restored(centre_FC, coding, expert)).square().sum()
        for expert, design_FC in enumerate(designs_EFC)
    ]
    return Loss(_share(residuals_EFC.square().sum(), total), _share(torch.stack(lost_E).sum(), total))


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """1 of nothing, as of experts that are all zeros."""
    return float(part / whole) if whole else 1.0


def _stored(layer: int, compressed: Compressed) -> Iterator[LazyTensor]:
    if compressed.centre_FC is not None:
        yield lazy("compressed", stored_name(layer, CENTRE), compressed.centre_FC)
    for leaf, values in compressed.coding.named_buffers():
        yield lazy("compressed", stored_name(layer, leaf), values)
    yield lazy("weight", f"layers.{layer}.moe.experts.b_out", compressed.b_out_ED)
