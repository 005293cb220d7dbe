"""Tensors of the published implementation under our names, and ours under theirs.

Both hold the same numbers in the same layout; only names differ, and what each side leaves out:

* a tied output weight or projection is listed twice there and once here;
* position frequencies are a buffer there and computed here;
* a HyperRouter layer there owns an unused linear router until its first forward pass;
* the embedding that generates a router is [1, D] there and [D] here.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from megamoe.config.schema import ModelConfig
from megamoe.errors import CheckpointError
from megamoe.models.attention import inverse_frequencies
from megamoe.models.embeddings import needs_projections, vocabulary_clusters, vocabulary_tables

# In the published order of parameters; # stands for the number of a layer or table.
NAMES = (
    ("r_w_bias", "attention_bias_u"),
    ("r_r_bias", "attention_bias_v"),
    ("word_emb.emb_layers.#.weight", "embedding.weights.#"),
    ("word_emb.emb_projs.#", "embedding.projections.#"),
    ("layers.#.dec_attn.qkv_net.weight", "layers.#.attention.qkv.weight"),
    ("layers.#.dec_attn.o_net.weight", "layers.#.attention.output.weight"),
    ("layers.#.dec_attn.layer_norm.weight", "layers.#.attention_norm.weight"),
    ("layers.#.dec_attn.layer_norm.bias", "layers.#.attention_norm.bias"),
    ("layers.#.dec_attn.r_net.weight", "layers.#.attention.position.weight"),
    ("layers.#.pos_ff.gate.embedding", "layers.#.moe.router.embedding"),
    ("layers.#.pos_ff.gate.hypernet.0.weight", "layers.#.moe.router.hypernet_w_in"),
    ("layers.#.pos_ff.gate.hypernet.0.bias", "layers.#.moe.router.hypernet_b_in"),
    ("layers.#.pos_ff.gate.hypernet.2.weight", "layers.#.moe.router.hypernet_w_out"),
    ("layers.#.pos_ff.gate.hypernet.2.bias", "layers.#.moe.router.hypernet_b_out"),
    ("layers.#.pos_ff.gate.gate.weight", "layers.#.moe.router.weight"),
    ("layers.#.pos_ff.gate.gate.bias", "layers.#.moe.router.bias"),
    ("layers.#.pos_ff.experts.htoh4.weight", "layers.#.moe.experts.w_in"),
    ("layers.#.pos_ff.experts.htoh4.bias", "layers.#.moe.experts.b_in"),
    ("layers.#.pos_ff.experts.h4toh.weight", "layers.#.moe.experts.w_out"),
    ("layers.#.pos_ff.experts.h4toh.bias", "layers.#.moe.experts.b_out"),
    ("layers.#.pos_ff.CoreNet.0.weight", "layers.#.feed_forward.w_in"),
    ("layers.#.pos_ff.CoreNet.0.bias", "layers.#.feed_forward.b_in"),
    ("layers.#.pos_ff.CoreNet.3.weight", "layers.#.feed_forward.w_out"),
    ("layers.#.pos_ff.CoreNet.3.bias", "layers.#.feed_forward.b_out"),
    ("layers.#.pos_ff.layer_norm.weight", "layers.#.feed_forward_norm.weight"),
    ("layers.#.pos_ff.layer_norm.bias", "layers.#.feed_forward_norm.bias"),
    ("crit.cluster_weight", "output.cluster_weight"),
    ("crit.cluster_bias", "output.cluster_bias"),
    ("crit.out_layers.#.weight", "output.weights.#"),
    ("crit.out_layers.#.bias", "output.biases.#"),
    ("crit.out_projs.#", "output.projections.#"),
)
_OURS = dict(NAMES)
_THEIRS = {ours: reference for reference, ours in NAMES}
_PLACES = {reference: place for place, (reference, _) in enumerate(NAMES)}
FREQUENCIES = "pos_emb.inv_freq"


def from_reference(state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """The published model's `state`, tensors by name, as a state dict of `TransformerXL`.

    Raises:
        CheckpointError: a tensor has no counterpart here, or one that `model` ties differs from the
            one it should equal.
    """
    for name, source in aliases(model).items():
        if name in state and source in state:
            check_tied(name, state[name], source, state[source])
    return {
        ours: state[name].flatten() if is_router_embedding(ours) else state[name]
        for name, ours in our_names(state, model).items()
    }


def our_names(names: Collection[str], model: ModelConfig) -> dict[str, str]:
    """By published name, for those that are kept: the name of the tensor in `TransformerXL`.

    Raises:
        CheckpointError: a tensor has no counterpart here.
    """
    left_out = {FREQUENCIES, *aliases(model)}
    return {
        name: _translate(name, _OURS)
        for name in names
        if name not in left_out and not _is_unused_router(name, names)
    }


def to_reference(state: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """A state dict of `TransformerXL` under the published names, with what is listed twice there.

    Raises:
        CheckpointError: a tensor has no counterpart there, such as those of a router it lacks.
    """
    result = {}
    for name, tensor in state.items():
        reference = published_name(name)
        result[reference] = tensor[None] if is_router_embedding(name) else tensor
    result |= {alias: result[source] for alias, source in aliases(model).items()}
    result[FREQUENCIES] = inverse_frequencies(model.d_model)
    return result


def published_name(name: str) -> str:
    """The published name of a tensor of `TransformerXL`.

    Raises:
        CheckpointError: it has no counterpart there.
    """
    return _translate(name, _THEIRS)


def is_router_embedding(name: str) -> bool:
    """Whether `name`, one of ours, is the vector that generates a router: [1, D] there, [D] here."""
    return name.endswith("router.embedding")


def check_tied(name: str, values: torch.Tensor, source: str, source_values: torch.Tensor) -> None:
    """Refuse published tensors that should be one and differ.

    Raises:
        CheckpointError: they do.
    """
    if not torch.equal(values, source_values):
        raise CheckpointError(f"tensor {name!r}: differs from {source!r}, set model.tie_weights=false")


def optimizer_order(names: Iterable[str]) -> list[str]:
    """Published names of trained parameters, sorted as the published optimiser numbers them."""

    def place(name: str) -> tuple[int, int, int]:
        pattern, number = _split(name)
        section = min(p for other, p in _PLACES.items() if other.split("#")[0] == pattern.split("#")[0])
        return section, int(number or 0), _PLACES[pattern]

    return sorted(names, key=place)


def _split(name: str) -> tuple[str, str]:
    """`layers.3.x` as `layers.#.x` and `3`: the first number counts, later ones belong to the name."""
    match = re.search(r"\.(\d+)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start(1)]}#{name[match.end(1) :]}", match[1]


def _translate(name: str, names: Mapping[str, str]) -> str:
    pattern, number = _split(name)
    if pattern not in names:
        raise CheckpointError(f"tensor {name!r}: has no counterpart, convert a model of another kind")
    return names[pattern].replace("#", number)


def aliases(model: ModelConfig) -> dict[str, str]:
    """Published names of tensors that are listed twice there, and the names they are kept under."""
    names = {}
    if model.tie_weights:
        for i in range(len(vocabulary_tables(model))):
            names[f"crit.out_layers.{i}.weight"] = f"word_emb.emb_layers.{i}.weight"
    if model.tie_projections and needs_projections(model):
        for i in range(1, len(vocabulary_clusters(model))):
            source = i if model.div_val > 1 else 0
            names[f"crit.out_projs.{i}"] = f"word_emb.emb_projs.{source}"
    return names


def _is_unused_router(name: str, names: Collection[str]) -> bool:
    layer, separator, _ = name.partition("gate.gate.")
    return bool(separator) and f"{layer}gate.embedding" in names
