"""Checkpoints whose experts are compressed.

The folder is that of a neutral checkpoint with another format in its manifest, and with

compression.json   the method, and what it has lost in each layer
kind `compressed`  for each mixture layer the tensors of its coding, see `megamoe.moe.codings`, and with some
                   methods a centre, as layers.N.moe.NAME, in place of the experts' w_in, b_in and w_out

Shapes: E experts, F hidden units, D model width, C = 2 D + 1.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.exported import ExportReader
from megamoe.checkpoint.format import COMPRESSED, COMPRESSION, EXPERT_MODES, is_compressed, parse_object
from megamoe.checkpoint.reader import CheckpointReader, locate
from megamoe.errors import CheckpointError, ConfigError
from megamoe.models.transformer_xl import Backbone
from megamoe.moe.codings import CODINGS, LowRank
from megamoe.moe.compressed import Compressed, FactoredExperts, OnTheFlyExperts

CENTRE = "centre"
REPLACED = ("w_in", "b_in", "w_out")
"""What the compressed tensors of a layer stand for; b_out is not compressed."""


@dataclass(frozen=True)
class Loss:
    """What compression has done to the experts of a layer, as shares of the sum of their squared weights.

    The output biases do not count.

    Attributes:
        residual: in the residuals before they were coded; 1 where there is no centre.
        lost: in the difference of the weights before and after.
    """

    residual: float
    lost: float


@dataclass(frozen=True)
class Compression:
    """The content of ``compression.json``.

    Attributes:
        method: name of the method.
        keep: fraction that was to be kept.
        coding: key of `megamoe.moe.codings.CODINGS`.
        has_centre: whether the experts of a layer share a centre.
        layers: by mixture layer.
    """

    method: str
    keep: float
    coding: str
    has_centre: bool
    layers: Mapping[int, Loss]

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of `EXPERT_MODES` in which its experts can be loaded."""
        return EXPERT_MODES if self.coding == LowRank.NAME else EXPERT_MODES[:2]

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Compression":
        """Parse the text.

        Raises:
            CheckpointError: it is no such document, or names a coding that is not known here.
        """
        body = parse_object(text, COMPRESSION)
        try:
            layers = {
                int(layer): Loss(float(loss["residual"]), float(loss["lost"]))
                for layer, loss in body["layers"].items()
            }
            found = cls(
                str(body["method"]),
                float(body["keep"]),
                str(body["coding"]),
                bool(body["has_centre"]),
                layers,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{COMPRESSION}: is incomplete ({error!r:.80})") from None
        if found.coding not in CODINGS:
            raise CheckpointError(
                f"{COMPRESSION}: coding = {found.coding!r:.40}: not one of {', '.join(CODINGS)}"
            )
        return found


class CompressedReader(CheckpointReader):
    """An open compressed checkpoint.

    Raises:
        CheckpointError: the folder is torn, or its manifest is not valid.
    """

    FORMAT = COMPRESSED

    @cached_property
    def compression(self) -> Compression:
        """How its experts were compressed; checked against the layers of the config and the tensors."""
        try:
            found = Compression.from_json(self._document(COMPRESSION))
            self._require_layers(found)
        except (CheckpointError, ConfigError) as error:
            raise self._error(str(error)) from None
        return found

    def _require_layers(self, compression: Compression) -> None:
        layers = self.config.moe.layer_indices(self.config.model.n_layers)
        if tuple(sorted(compression.layers)) != layers:
            raise CheckpointError(
                f"{COMPRESSION}: layers = {sorted(compression.layers)}, config {list(layers)}"
            )
        known = [CENTRE] * compression.has_centre + [*CODINGS[compression.coding].TENSORS]
        expected = {stored_name(layer, leaf) for layer in layers for leaf in known}
        if unknown := set(self.names("compressed")) - expected:
            raise CheckpointError(f"{min(unknown)}: does not belong to coding {compression.coding!r}")

    def experts(self, layer: int) -> Compressed:
        """The compressed experts of a mixture layer.

        Raises:
            CheckpointError: a tensor is missing, or is not what its coding or the config says.
        """
        moe, model = self.config.moe, self.config.model
        shape = (moe.d_expert, 2 * model.d_model + 1)
        coding_class = CODINGS[self.compression.coding]
        coding = coding_class(
            shape,
            **{leaf: self.tensor("compressed", stored_name(layer, leaf)) for leaf in coding_class.TENSORS},
        )
        centre_FC = None
        if self.compression.has_centre:
            centre_FC = self.tensor("compressed", stored_name(layer, CENTRE))
        b_out_ED = self.tensor("weight", f"layers.{layer}.moe.experts.b_out")
        try:
            coding.require_sound(moe.n_experts)
            if centre_FC is not None and (tuple(centre_FC.shape), centre_FC.dtype) != (shape, torch.float32):
                raise CheckpointError(f"{CENTRE}: is not float32 {list(shape)}")
        except CheckpointError as error:
            raise self._error(f"layers.{layer}.moe.{error}") from None
        return Compressed(centre_FC, coding, b_out_ED)


def stored_name(layer: int, leaf: str) -> str:
    """Name of a tensor of kind `compressed`."""
    return f"layers.{layer}.moe.{leaf}"


def open_reader(path: str | Path) -> CheckpointReader:
    """The checkpoint that `path` means, see `locate`; a `CompressedReader` if it is compressed."""
    folder = locate(path)
    return CompressedReader(folder) if is_compressed(folder) else CheckpointReader(folder)


def replaced_names(reader: CheckpointReader) -> tuple[str, ...]:
    """Names of the model's weights that the checkpoint holds in compressed form; none if it is neutral."""
    layers = reader.compression.layers if isinstance(reader, CompressedReader) else ()
    return tuple(f"layers.{layer}.moe.experts.{leaf}" for layer in layers for leaf in REPLACED)


def restored_tensors(reader: CompressedReader) -> dict[str, torch.Tensor]:
    """The weights of all experts by their names in the model."""
    return {
        f"layers.{layer}.moe.experts.{leaf}": values
        for layer in reader.compression.layers
        for leaf, values in reader.experts(layer).weights()._asdict().items()
    }


def keep_compressed(reader: CompressedReader, model: Backbone, mode: str) -> None:
    """Replace the experts of `model` by those of `reader`, computed by `mode`, which is not "restore"."""
    computed = FactoredExperts if mode == "factored" else OnTheFlyExperts
    for layer in reader.compression.layers:
        block: Any = model.layers[layer]
        block.moe.experts = computed(*reader.experts(layer))


def require_mode(mode: str, reader: CheckpointReader | ExportReader) -> None:
    """Refuse a mode in which the experts of `reader` cannot be loaded.

    Raises:
        ConfigError: naming the mode and what to do.
    """
    if mode not in EXPERT_MODES:
        raise ConfigError(f"experts = {mode!r}: give {', '.join(EXPERT_MODES)}")
    if mode == "restore":
        return
    if not isinstance(reader, CompressedReader):
        raise ConfigError(f"experts = {mode!r}: only compressed checkpoints have the choice; leave it out")
    if mode not in reader.compression.modes:
        raise ConfigError(
            f"experts = {mode!r}: is for residuals of low rank, and these are {reader.compression.coding};"
            " give on_the_fly"
        )
