"""When checkpoints are written, and which are kept."""

from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.retention import prune
from megamoe.config.schema import CheckpointConfig
from megamoe.training.callbacks.callback import Callback, StepRecord

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Saves every so many steps and at the end, and the best by validation loss; on every rank."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config

    def on_step_end(self, trainer: "Trainer", record: StepRecord) -> None:
        """Write ``best/`` if it has a new owner and ``checkpoints/step-*`` if it is due, from one copy."""
        folders = [trainer.folder.best] if trainer.best_step == trainer.step else []
        if trainer.is_due(self.config.every):
            folders.append(trainer.folder.checkpoints / step_folder(trainer.step))
        if folders:
            trainer.save(folders)

    def on_checkpoint(self, trainer: "Trainer", folder: Path) -> None:
        """Delete those that are not to be kept."""
        if trainer.world.is_main and folder.parent == trainer.folder.checkpoints:
            prune(folder.parent, self.config.keep_last, self.config.keep_every)
