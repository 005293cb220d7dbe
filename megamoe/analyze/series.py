"""The checkpoints of one model, from its start on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megamoe.checkpoint.exported import is_export
from megamoe.checkpoint.format import MANIFEST, step_folders
from megamoe.checkpoint.load import load_model, load_tokenizer, open_model
from megamoe.checkpoint.reader import CHECKPOINTS, locate
from megamoe.config.schema import RunConfig
from megamoe.data.tokenizers import Tokenizer
from megamoe.errors import CheckpointError, ConfigError
from megamoe.models.model_of import model_of
from megamoe.moe.routers import router_class
from megamoe.training.evaluation import require_causal


@dataclass(frozen=True)
class Checkpoint:
    """One of a series.

    Attributes:
        name: its path, or "untrained".
        step: optimizer steps behind it.
        load: gives the model, in evaluation mode.
    """

    name: str
    step: int
    load: Callable[[], Any]


@dataclass(frozen=True)
class Series:
    """Checkpoints of one language model with experts.

    Attributes:
        run: config of the last one's run.
        tokenizer: of their text.
        checkpoints: with rising steps.
    """

    run: RunConfig
    tokenizer: Tokenizer
    checkpoints: Sequence[Checkpoint]


def open_series(paths: Sequence[Path], *, untrained: bool = False) -> Series:
    """All checkpoints of `paths` by rising steps; only configs are read yet.

    Args:
        paths: run folders, whose ``step-*`` checkpoints are all taken; checkpoints; or exported models.
        untrained: begin with the model before its first step, which follows from its config.

    Raises:
        CheckpointError: there is no complete checkpoint, or they are of different models.
        ConfigError: the model is none with experts that predicts text.
    """
    found = []
    for folder in (folder for path in paths for folder in _folders(path)):
        reader = open_model(folder)
        found.append((reader.state.step, folder, reader.config))
    found.sort(key=lambda item: item[0])
    _require_one_model([(folder, run) for _, folder, run in found])
    _, last, run = found[-1]
    tokenizer = load_tokenizer(last)
    _require_language_model(run)
    if tokenizer.vocab_size != run.model.vocab_size:
        raise CheckpointError(
            f"checkpoint {str(last)!r}: its tokenizer has {tokenizer.vocab_size} symbols, its model"
            f" {run.model.vocab_size}; it is corrupt or was changed"
        )
    checkpoints = [Checkpoint(str(folder), step, partial(load_model, folder)) for step, folder, _ in found]
    if untrained:
        checkpoints.insert(0, Checkpoint("untrained", 0, lambda: model_of(run).eval()))
    return Series(run, tokenizer, checkpoints)


def _folders(path: Path) -> Iterable[Path]:
    if (path / MANIFEST).exists() or is_export(path):
        return [path]
    steps = [folder for _, folder in step_folders(path / CHECKPOINTS)]
    return steps or [locate(path)]


def _require_one_model(found: Sequence[tuple[Path, RunConfig]]) -> None:
    (first, run), *others = found
    expected = _identity(run)
    for folder, other in others:
        for name, value in _identity(other).items():
            if value != expected[name]:
                raise CheckpointError(
                    f"checkpoint {str(folder)!r}: {name} = {value!r}, but {expected[name]!r} in"
                    f" {str(first)!r}; give checkpoints of one model"
                )


def _identity(run: RunConfig) -> dict[str, Any]:
    """What two checkpoints of one model have in common."""
    values = run.to_dict()
    sections = {"model": values["model"], "moe": values["moe"], "training": values["training"]}
    names = {
        "model": list(values["model"]),
        "moe": ["layers", "n_experts", "d_expert", "router"],
        "training": ["seed"],
    }
    return {f"{section}.{name}": sections[section][name] for section in names for name in names[section]}


def _require_language_model(run: RunConfig) -> None:
    if run.task.name:
        raise ConfigError(
            f"task.name = {run.task.name!r}: is a classifier; give a language model's checkpoint"
        )
    if not run.moe.layer_indices(run.model.n_layers):
        raise ConfigError(f"moe.layers = {run.moe.layers!r}: no layer has experts to analyze")
    if router_class(run.moe.router.name).owns_feed_forward:
        raise ConfigError(f"moe.router.name = {run.moe.router.name!r}: its layers have no experts to analyze")
    require_causal(run)
