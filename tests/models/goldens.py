"""Models and tensors of the golden cases: numbers of the published implementation (see tests/goldens)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe.config.schema import ModelConfig, MoEConfig, RouterConfig, TopKScheduleConfig
from megamoe.models.reference_names import from_reference
from megamoe.models.transformer_xl import TransformerXL

GOLDENS = Path(__file__).parents[1] / "goldens"


class Golden:
    """One golden case: its configuration, its arrays, and the model they come from."""

    def __init__(self, kind: str, name: str) -> None:
        folder = GOLDENS / kind
        self.facts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        self.config: dict[str, Any] = self.facts["config"]
        with np.load(folder / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.model_config = _model_config(self.config, self.arrays)
        self.moe_config = _moe_config(self.config)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The arrays below `prefix`, by the rest of their names."""
        return {
            key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)
        }

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix` under our names."""
        return from_reference(self.group(prefix), self.model_config)

    def model(self, prefix: str) -> TransformerXL:
        """The model with the parameters below `prefix`; every tensor must find its place."""
        model = TransformerXL(self.model_config, self.moe_config, seed=0)
        model.load_state_dict(self.state(prefix), strict=True)
        return model


def golden_names(kind: str) -> list[str]:
    """Every case in the folder, so that none can be forgotten."""
    return sorted(path.stem for path in (GOLDENS / kind).glob("*.npz"))


def _model_config(config: dict[str, Any], arrays: dict[str, torch.Tensor]) -> ModelConfig:
    embedding = next(array for key, array in arrays.items() if key.endswith("word_emb.emb_layers.0.weight"))
    return ModelConfig(
        vocab_size=len(embedding),
        n_layers=config["n_layer"],
        d_model=config["d_model"],
        n_heads=config["n_head"],
        d_head=config["d_head"],
        d_inner=config["d_inner"],
        dropout=config.get("dropout", 0.0),
        attention_dropout=config.get("dropatt", 0.0),
        pre_norm=config.get("pre_lnorm", False),
        segment_len=config["tgt_len"],
        memory_len=config["mem_len"],
        same_length=config.get("same_length", False),
        clamp_len=max(config.get("clamp_len", -1), 0),
        cutoffs=tuple(config.get("cutoffs", ())),
        tie_weights=config.get("tied", True),
    )


def _moe_config(config: dict[str, Any]) -> MoEConfig:
    if not config["moe"]:
        return MoEConfig(layers="none")
    index = config.get("moe_index", "all")
    linear = "smoe_dropout" if config.get("freeze_gate") else "smoe"
    hidden = {"hyper_size": config.get("hyper_size") or 256}
    gate = config.get("gate") or config["gate_name"]
    routers = {"HyperRouterGate": ("hyper", hidden), "CustomNaiveGate": (linear, {})}
    name, options = routers[gate]
    schedule = TopKScheduleConfig()
    if config.get("dynamic_moe"):
        schedule = TopKScheduleConfig(
            mode=config["dynamic_moe_mode"],
            min_k=config["moe_top_k_min"],
            max_k=config["moe_top_k_max"],
            steps=config["dynamic_overall_steps"],
        )
    return MoEConfig(
        layers=index if isinstance(index, str) else ",".join(map(str, index)),
        n_experts=config.get("num_expert") or config["moe_num_expert"],
        d_expert=config["d_inner"],
        top_k=config.get("moe_top_k") or 1,
        router=RouterConfig(name=name, options=options),
        schedule=schedule,
    )
