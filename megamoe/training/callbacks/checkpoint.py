"""When checkpoints are written, and which are kept."""

from typing import TYPE_CHECKING

from megamoe.checkpoint.retention import prune
from megamoe.config.schema import CheckpointConfig
from megamoe.training.callbacks.callback import Callback, StepRecord
from megamoe.training.evaluation import Evaluation

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Saves every so many steps and at the end, and the best by validation loss; on every rank."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Write ``best/`` when it has a new owner."""
        if evaluation.split == "valid" and trainer.best_step == trainer.step:
            trainer.save_best()

    def on_step_end(self, trainer: "Trainer", record: StepRecord) -> None:
        """Write ``checkpoints/step-*`` where it is due, then delete those that are not to be kept."""
        if trainer.is_due(self.config.every):
            trainer.save()
            if trainer.world.is_main:
                prune(trainer.folder.checkpoints, self.config.keep_last, self.config.keep_every)
