"""A small dense model, and whether another one computes the same."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from megamoe.convert.neutral import open_neutral
from megamoe.models.transformer_xl import TransformerXL
from tests.checkpoint.runs import VOCAB_SIZE
from tests.checkpoint.small import model_of, write_model

BATCH, SEGMENT = 3, 6


def write_dense(folder: Path, **updates: Any) -> TransformerXL:
    """Weights far from zero, biases too, so that a lost one shows."""
    config, model = model_of(moe={"layers": "none"}, model={"init_std": 0.2, **updates})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    write_model(folder, config, model)
    return model.eval()


def require_same_function(a: TransformerXL, b: TransformerXL) -> None:
    """Logits of several segments with memory: equal within 2e-6; in double, up to the rounding of weights."""
    torch.testing.assert_close(logits(a), logits(b), rtol=0, atol=2e-6)
    in_double = (logits(deepcopy(model).double()) for model in (a, b))
    torch.testing.assert_close(*in_double, rtol=0, atol=1e-7)


def logits(model: TransformerXL, n_segments: int = 3) -> torch.Tensor:
    """Of several segments with the memory of those before, [n, B, S, V]."""
    text_BN = torch.randint(
        VOCAB_SIZE, (BATCH, n_segments * SEGMENT), generator=torch.Generator().manual_seed(1)
    )
    memory, result = None, []
    with torch.no_grad():
        for ids_BS in text_BN.split(SEGMENT, dim=1):
            output = model(ids_BS, memory=memory, return_logits=True)
            memory = output.memory
            result.append(output.logits_BSV)
    return torch.stack(result)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.checked() for tensor in open_neutral(folder)[0]}
