"""The run config of a published model, from the shapes of its tensors and the settings in its pickle."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from megamoe.config.load import from_dict, merge, parse_overrides
from megamoe.config.schema import RunConfig
from megamoe.convert.published import PublishedModel
from megamoe.errors import CheckpointError

_LINEAR_GATES = ("CustomNaiveGate", "CustomNaiveGate_Balance", "NaiveGate")


def run_config(
    published: PublishedModel, overrides: Sequence[str] = (), optimizer: Mapping[str, Any] | None = None
) -> RunConfig:
    """The config under which `published` computes what it computed.

    A state dict does not hold everything: dropout, the position of the norms and the lengths of segment
    and memory are then the defaults.

    Args:
        published: the model.
        overrides: settings as ``section.key=value``, which win.
        optimizer: settings of its optimizer, if known.

    Raises:
        CheckpointError: a tensor that every such model has is missing, its router is not known here, or its
            cut-offs must be given.
        ConfigError: a setting is not valid.
    """
    values = {
        "model": _shapes(published) | _settings(published),
        "moe": _mixture(published),
        "optimizer": optimizer or {},
    }
    config = from_dict(merge(values, parse_overrides(overrides)))
    if "crit.cluster_weight" in published.tensors and not config.model.cutoffs:
        raise CheckpointError(
            f"file {str(published.path)!r}: does not hold model.cutoffs; give model.cutoffs=A,B,..."
        )
    return config


def _shape(published: PublishedModel, name: str, n_dims: int) -> tuple[int, ...]:
    tensor = published.tensors.get(name)
    if tensor is None or len(tensor.shape) != n_dims or 0 in tensor.shape:
        what = "missing" if tensor is None else f"has shape {list(tensor.shape)}"
        raise CheckpointError(f"file {str(published.path)!r}: {name}: {what}; it is no Transformer-XL")
    return tensor.shape


def _count(published: PublishedModel, pattern: str) -> int:
    """How many of the tensors `pattern`, with # as 0, 1, 2 and so on, there are."""
    count = 0
    while pattern.replace("#", str(count)) in published.tensors:
        count += 1
    return count


def _shapes(published: PublishedModel) -> dict[str, Any]:
    n_heads, d_head = _shape(published, "r_w_bias", 2)
    (d_model,) = _shape(published, "layers.0.dec_attn.layer_norm.weight", 1)
    n_tables = _count(published, "word_emb.emb_layers.#.weight")
    tables = [_shape(published, f"word_emb.emb_layers.{i}.weight", 2) for i in range(max(n_tables, 1))]
    values: dict[str, Any] = {
        "vocab_size": sum(rows for rows, _ in tables),
        "n_layers": _count(published, "layers.#.dec_attn.qkv_net.weight"),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": d_head,
        "d_embed": 0 if tables[0][1] == d_model else tables[0][1],
        "cutoffs": _cutoffs(published, [rows for rows, _ in tables]),
        "div_val": 1 if len(tables) == 1 else tables[0][1] // max(tables[1][1], 1),
        "tie_weights": _are_one(published, "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"),
        # The head's own projection may be tied or not; only those of the tails follow this option.
        "tie_projections": _are_one(
            published, f"word_emb.emb_projs.{int(len(tables) > 1)}", "crit.out_projs.1"
        ),
    }
    for i in range(values["n_layers"]):
        if f"layers.{i}.pos_ff.CoreNet.0.weight" in published.tensors:
            values["d_inner"] = _shape(published, f"layers.{i}.pos_ff.CoreNet.0.weight", 2)[0]
    return values


def _cutoffs(published: PublishedModel, sizes: list[int]) -> list[int]:
    if len(sizes) > 1:
        return list(accumulate(sizes[:-1]))
    described = published.attribute("word_emb", "cutoffs")
    return described[:-1] if isinstance(described, list) else []


def _are_one(published: PublishedModel, name: str, other: str) -> bool:
    tensors = published.tensors
    return name in tensors and other in tensors and tensors[name] == tensors[other]


def _settings(published: PublishedModel) -> dict[str, Any]:
    """What the pickle of a whole model says beyond shapes."""
    clamp_len = published.attribute("", "clamp_len")
    found = {
        "dropout": published.attribute("drop", "p"),
        "attention_dropout": published.attribute("layers.0.dec_attn.dropatt", "p"),
        "pre_norm": published.attribute("layers.0.dec_attn", "pre_lnorm"),
        "segment_len": published.attribute("", "tgt_len"),
        "memory_len": published.attribute("", "mem_len"),
        "same_length": published.attribute("", "same_length"),
        "clamp_len": max(clamp_len, 0) if isinstance(clamp_len, int) else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _mixture(published: PublishedModel) -> dict[str, Any]:
    suffix = ".pos_ff.experts.htoh4.weight"
    names = [name for name in published.tensors if name.endswith(suffix)]
    if not names:
        return {"layers": "none"}
    sizes = {_shape(published, name, 3)[:2] for name in names}
    routers = [_router(published, name.removesuffix(".experts.htoh4.weight")) for name in names]
    if len(sizes) > 1 or any(router != routers[0] for router in routers):
        raise CheckpointError(f"file {str(published.path)!r}: its mixture layers differ in size or router")
    n_experts, d_expert = sizes.pop()
    top_k = published.attribute(names[0].removesuffix(".experts.htoh4.weight"), "top_k")
    return {
        "layers": ",".join(name.removesuffix(suffix).removeprefix("layers.") for name in names),
        "n_experts": n_experts,
        "d_expert": d_expert,
        "top_k": min(2, n_experts) if top_k is None else top_k,
        "router": routers[0],
    }


def _router(published: PublishedModel, layer: str) -> dict[str, Any]:
    gate = published.modules.get(f"{layer}.gate", ("", {}))[0]
    if f"{layer}.gate.embedding" in published.tensors and gate in ("HyperRouterGate", ""):
        hyper_size, _ = _shape(published, f"{layer}.gate.hypernet.0.weight", 2)
        return {"name": "hyper", "hyper_size": hyper_size}
    linear = published.tensors.get(f"{layer}.gate.gate.weight")
    if linear is None or gate not in (*_LINEAR_GATES, ""):
        raise CheckpointError(f"file {str(published.path)!r}: {layer}.gate: {gate} has no counterpart here")
    return {"name": "smoe" if linear.requires_grad else "smoe_dropout"}
