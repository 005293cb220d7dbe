"""Weights & Biases, where it is installed and asked for."""

import hashlib
import importlib
from typing import TYPE_CHECKING, Any

from megamoe.errors import ConfigError
from megamoe.training.callbacks.callback import Callback
from megamoe.training.evaluation import Evaluation

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class WandbCallback(Callback):
    """Reports what metrics.jsonl holds; a resumed run goes on in the same W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError(
                "logging.wandb = True: wandb is not installed; pip install 'megamoe[wandb]', or leave it off"
            ) from None
        self.project = project
        self._session: Any = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open, or reopen, the run that belongs to this run folder."""
        root = trainer.folder.root.resolve()
        self._session = self._wandb.init(
            project=self.project,
            name=trainer.run.name,
            id=hashlib.sha256(str(root).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(root),
            config=trainer.run.to_dict(),
        )

    def on_log(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """Send the interval."""
        self._session.log(metrics, step=trainer.step)

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Send the figures of the split."""
        self._session.log(evaluation.metrics(), step=trainer.step)

    def on_train_end(self, trainer: "Trainer") -> None:
        """Mark the run as finished."""
        self._session.finish()

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        """Mark the run as failed."""
        if self._session is not None:
            self._session.finish(exit_code=1)
