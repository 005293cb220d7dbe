"""Checkpoints of small models of bytes."""

from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.format import step_folder
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.models.transformer_xl import TransformerXL
from tests.checkpoint.small import write_model

RUN: dict[str, Any] = {
    "model": {
        "vocab_size": 256, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24,
        "segment_len": 16, "memory_len": 0,
    },
    "moe": {"n_experts": 4, "d_expert": 8, "router": {"name": "smoe"}},
}  # fmt: skip


def byte_model(noise: float = 0.5, **updates: Any) -> tuple[RunConfig, TransformerXL]:
    """A model whose weights are random, by `noise` further than at its start; two layers of 4 x 8 neurons."""
    run = from_dict(merge(RUN, updates))
    model = TransformerXL(run.model, run.moe, seed=run.training.seed).eval()
    draws = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draws), alpha=noise)
    return run, model


def write_bytes(folder: Path, noise: float = 0.5, step: int = 1, **updates: Any) -> Path:
    run, model = byte_model(noise, **updates)
    return write_model(folder, run, model, tokenizer=ByteTokenizer().to_dict(), step=step)


def write_run(root: Path, steps: int = 3) -> Path:
    """A run folder with a checkpoint after each of so many steps."""
    for step in range(1, steps + 1):
        write_bytes(root / "checkpoints" / step_folder(step), step / steps, step)
    return root
