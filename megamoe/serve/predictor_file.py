"""A trained predictor as a folder: predictor.safetensors, predictor.json, and what it learnt from, routings/.

It belongs to one checkpoint, which is told by the embedding that both read.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamoe.errors import CheckpointError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.predictor import Predictor, PredictorShape

WEIGHTS, DESCRIPTION, ROUTINGS = "predictor.safetensors", "predictor.json", "routings"


def save_predictor(predictor: Predictor, folder: Path, model: TransformerXL, figures: dict[str, Any]) -> None:
    """Write a predictor of `model` into an existing folder, with figures of how well it does."""
    save_file(predictor.state_dict(), folder / WEIGHTS)
    values = {"shape": asdict(predictor.shape), "model": fingerprint(model), "figures": figures}
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_predictor(path: str | Path, model: TransformerXL) -> Predictor:
    """The predictor of a folder, in evaluation mode on the device of `model`.

    Raises:
        CheckpointError: there is none, it is damaged, or that of another model.
    """
    folder = Path(path)
    try:
        values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if values["model"] != fingerprint(model):
            raise _error(folder, "belongs to another checkpoint; run megamoe predict-experts for this one")
        predictor = Predictor(PredictorShape(**values["shape"]))
        predictor.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _error(folder, f"cannot be read ({str(error)[:120]})") from None
    require_fit(predictor.shape, model, folder)
    return predictor.to(model.attention_bias_u.device).eval()


def require_fit(shape: PredictorShape, model: TransformerXL, folder: Path) -> None:
    """Refuse a predictor that does not speak of the experts of `model`.

    Raises:
        CheckpointError: the sizes of both.
    """
    ours = (model.model_config.d_model, len(model.moe_layers), model.moe_config.n_experts)
    if ours != (shape.d_model, shape.n_layers, shape.n_experts):
        raise _error(folder, f"is of {shape}, but the model has D, L, E = {ours}")


def fingerprint(model: TransformerXL) -> str:
    """SHA-256 of the model's embedding."""
    digest = hashlib.sha256()
    for table in model.embedding.parameters():
        digest.update(table.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _error(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"predictor {str(folder)!r}: {problem}")
