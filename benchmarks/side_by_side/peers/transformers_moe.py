"""Hugging Face transformers' mixture block: the real package, Mixtral's, at equal FLOPs.

Its experts are gated (SwiGLU: three products instead of two), without biases and without dropout, so they
get 2/3 of the hidden width, to a multiple of 8, and are compared with ours without dropout. "eager" is the
loop over experts that its models fall back to, "grouped_mm" the grouped products of torch.

The package is optional: `pip install 'megamoe[bench]'`.
"""

import importlib
from typing import Any

import torch
from torch import nn

IMPLEMENTATIONS = ("eager", "grouped_mm")


def why_absent() -> str:
    """Empty if the block can be built; else the reason, in one line."""
    try:
        importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


class TransformersLayer(nn.Module):
    """Mixtral's block with the router of ours and experts of its own.

    Args:
        gate_ED: the router's weight.
        d_expert: hidden width of our experts.
        implementation: one of `IMPLEMENTATIONS`.
    """

    def __init__(self, gate_ED: torch.Tensor, d_expert: int, top_k: int, implementation: str) -> None:
        super().__init__()
        mixtral: Any = importlib.import_module("transformers.models.mixtral")
        modeling: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        n_experts, d_model = gate_ED.shape
        config = mixtral.MixtralConfig(
            hidden_size=d_model, intermediate_size=equal_width(d_expert), num_local_experts=n_experts,
            num_experts_per_tok=top_k, experts_implementation=implementation,
        )  # fmt: skip
        self.block = modeling.MixtralSparseMoeBlock(config)
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.block.gate.weight.data.copy_(gate_ED)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Its output."""
        output: torch.Tensor = self.block(x_TD[None])[0]
        return output


def equal_width(d_expert: int) -> int:
    """Hidden width of a gated expert that costs what one of two products of width `d_expert` does."""
    return max(8, round(d_expert * 2 / 3 / 8) * 8)
