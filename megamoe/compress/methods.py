"""A checkpoint compressed by one of the methods.

    resmoe  barycenter of the experts as they are best aligned, and pruned or low-rank residuals
    svd     truncated singular value decomposition of each expert's design matrix
    prune   the largest entries of each expert's design matrix
    merge   M-SMoE, one expert for each group
    drop    the most useful experts alone

Shapes: E experts, F hidden units, C numbers of a unit, D model width, G groups.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megamoe.checkpoint.compressed import CENTRE, REPLACED, Compression, Loss, stored_name
from megamoe.compress import drop
from megamoe.compress.barycenter import reordered
from megamoe.compress.merge import aligned_to, dominant_experts, group_means, groups_of
from megamoe.compress.settings import Settings
from megamoe.compress.source import Source
from megamoe.convert.feed_forwards import new_run
from megamoe.convert.neutral_writer import require_new, write_compressed, write_neutral
from megamoe.convert.tensors import LazyTensor, lazy
from megamoe.errors import CheckpointError
from megamoe.moe.codings import LowRank, Pruned, Shared
from megamoe.moe.compressed import Compressed, restored

_CODINGS: dict[str, type[Pruned] | type[LowRank]] = {"prune": Pruned, "svd": LowRank}

# The experts in the order of units in which they are stored, [E, F, C] float64, and what is stored.
_Encoded = tuple[torch.Tensor, Compressed]


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
        designs_EFC, layers[layer] = _ENCODERS[settings.method](source, layer, settings)
        losses[layer] = _loss(designs_EFC, layers[layer])
    centre_FC, coding, _ = layers[source.layers[0]]
    compression = Compression(settings.name, settings.keep, coding.NAME, centre_FC is not None, losses)
    tensors = [*source.apart_from((*REPLACED, "b_out"))]
    for layer, compressed in layers.items():
        tensors += _stored(layer, compressed)
    state = source.state.of_other_weights()
    write_compressed(folder, tensors, source.config, state, compression.to_json())
    return losses


def _resmoe(source: Source, layer: int, settings: Settings) -> _Encoded:
    found = source.barycenter(layer, settings.starts)
    aligned_EFC = reordered(source.designs(layer), found.orders_EF)
    centre_FC = found.centre_FC.float()
    # Of the centre as it is stored, so that the residuals mend its rounding.
    coding = _CODINGS[settings.residual].of(aligned_EFC - centre_FC, settings.keep)
    return aligned_EFC, Compressed(centre_FC, coding, source.leaf(layer, "b_out"))


def _plain(source: Source, layer: int, settings: Settings) -> _Encoded:
    designs_EFC = source.designs(layer)
    coding = _CODINGS[settings.method].of(designs_EFC, settings.keep)
    return designs_EFC, Compressed(None, coding, source.leaf(layer, "b_out"))


def _merge(source: Source, layer: int, settings: Settings) -> _Encoded:
    used = source.usage[layer]
    if used.products_EE is None:
        raise CheckpointError(
            f"moe.router.name = {source.config.moe.router.name!r}: gives experts no scores to be alike in,"
            " which --method merge needs"
        )
    dominant_G = dominant_experts(source.usage, settings.keep)[layer]
    groups_E = groups_of(used.products_EE, dominant_G)
    aligned_EFC = aligned_to(source.designs(layer), dominant_G[groups_E])
    matrices_GFC = group_means(aligned_EFC, groups_E, used.frequency_E).float()
    b_out_GD = group_means(source.leaf(layer, "b_out").double(), groups_E, used.frequency_E).float()
    shape = (matrices_GFC.shape[1], matrices_GFC.shape[2])
    coding = Shared(shape, matrices=matrices_GFC, groups=groups_E)
    return aligned_EFC, Compressed(None, coding, b_out_GD[groups_E])


# All but `drop`, which makes a smaller model instead of coding the experts of this one.
_ENCODERS: dict[str, Callable[[Source, int, Settings], _Encoded]] = {
    "resmoe": _resmoe, "svd": _plain, "prune": _plain, "merge": _merge,
}  # fmt: skip


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
