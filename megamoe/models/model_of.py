"""Which model a run's config describes."""

from typing import Any

from megamoe.config.schema import RunConfig
from megamoe.models.classifier import Classifier
from megamoe.models.transformer_xl import Backbone, TransformerXL


def model_of(run: RunConfig, **settings: Any) -> Backbone:
    """A classifier if the run has a task, else a language model.

    Args:
        run: its vocabulary, and the labels of its task, known.
        settings: as `Backbone` takes them.

    Raises:
        ConfigError: the vocabulary is unknown or a setting does not fit the others.
    """
    seed = run.training.seed
    if run.task.name:
        return Classifier(run.model, run.moe, n_classes=len(run.task.labels), seed=seed, **settings)
    return TransformerXL(run.model, run.moe, seed=seed, **settings)
