"""Small models for tests."""

from typing import Any

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.models.transformer_xl import TransformerXL

VOCABULARY = 13


def small_config(**changes: Any) -> ModelConfig:
    """Two layers, no dropout."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 6, "d_inner": 12,
        "segment_len": 6, "memory_len": 6, "dropout": 0.0, "init_std": 0.3,
    }  # fmt: skip
    return ModelConfig(**sizes | changes)


def small_model(*, moe_layers: str = "all", seed: int = 5, **changes: Any) -> TransformerXL:
    """The model of `small_config` with four experts per mixture layer."""
    moe = MoEConfig(layers=moe_layers, n_experts=4, d_expert=10, top_k=2)
    return TransformerXL(small_config(**changes), moe, seed=seed)
