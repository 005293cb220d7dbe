"""How a language model becomes a classifier: two sets of defaults over its own config.

``transfer`` is the sound one: the checkpoint's tokenizer, so that its embeddings transfer; no memory from
one sentence to the next; several passes over the data with decoupled weight decay.

``reference`` is the published fine-tuning script: lower-cased words with a vocabulary of the labelled text,
so that no embedding transfers, memory carried between unrelated sentences, Adam at 1e-4 for 5000 steps of
16 sentences. What stays different, because it would falsify figures: the weights are selected on sentences
that are not the scored ones, no sentence is left unscored, lines with quotes do not merge, and a
hypernetwork stays frozen.

Both train with all experts, as published, and score with fewer.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megamoe.config.load import from_dict, merge, nearest, parse_overrides, read_file
from megamoe.config.schema import OF_THE_VOCABULARY, ModelConfig, RunConfig
from megamoe.errors import ConfigError

RECIPES: dict[str, dict[str, Any]] = {
    "transfer": {
        "task": {"bucket": 16},
        "model": {"dropout": 0.1, "segment_len": 512, "memory_len": 0, "same_length": False},
        "optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.01, "warmup_steps": 100},
        "training": {"max_steps": 2000, "batch_size": 32, "grad_clip": 1.0},
        "evaluation": {"every": 250, "batch_size": 64, "memory_len": 0},
        "checkpoint": {"every": 500},
        "logging": {"every": 50},
    },
    "reference": {
        "task": {"tokens": "words"},
        "model": {"dropout": 0.1, "attention_dropout": 0.0, "segment_len": 512, "memory_len": 128},
        "optimizer": {"lr": 1e-4},
        "training": {"max_steps": 5000, "batch_size": 16},
        "evaluation": {"every": 500, "batch_size": 16},
        "checkpoint": {"every": 500},
        "logging": {"every": 100},
    },
}


def finetune_config(
    saved: RunConfig, recipe: str, *, file: str | Path = "", overrides: Iterable[str] = ()
) -> RunConfig:
    """The run that fine-tunes a language model. Later wins: its config, recipe, file, overrides.

    Of its config only the model, the mixture layers, the text and the seed are taken over.

    Args:
        saved: config of the language model.
        recipe: a key of `RECIPES`.
        file: TOML or JSON.
        overrides: ``section.option=value``.

    Raises:
        ConfigError: unknown recipe or key, or a value that is refused.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"recipe = {recipe!r}: unknown, {nearest(recipe, RECIPES)}")
    kept = saved.to_dict()
    n_experts = saved.moe.n_experts
    asked = merge(read_file(file) if file else {}, parse_overrides(overrides))
    if "data" in asked:
        raise ConfigError("data: is the text of the language model; set task.path (--data) for labelled text")
    values = {
        "data": kept["data"],
        "model": kept["model"],
        "moe": kept["moe"]
        | {"schedule": {"mode": "linear_increase", "min_k": n_experts, "max_k": n_experts}},
        "training": {"seed": saved.training.seed},
    }
    for layer in (copy.deepcopy(RECIPES[recipe]), asked):
        values = merge(values, layer)
    if values["task"].get("tokens") == "words":
        values["model"] |= {name: getattr(ModelConfig, name) for name in OF_THE_VOCABULARY}
    values.setdefault("name", f"{values['task'].get('name', 'task')}-{saved.moe.router.name}")
    run = from_dict(values)
    if run.evaluation.max_tokens:
        raise ConfigError(
            f"evaluation.max_tokens = {run.evaluation.max_tokens}: splits of sentences are scored as a whole;"
            " leave it at 0"
        )
    return run
