"""TensorBoard events in the run folder: ``tensorboard --logdir runs``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.training.callbacks.callback import Callback
from megamoe.training.evaluation import Evaluation

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class TensorBoardCallback(Callback):
    """Writes every single number of metrics.jsonl as a scalar against the step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the event file; events of a cut run past the resumed step are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def on_log(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """Write the interval."""
        self._write(trainer.step, metrics)

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Write the figures of the split."""
        self._write(trainer.step, evaluation.metrics())

    def on_train_end(self, trainer: "Trainer") -> None:
        """Flush."""
        self._writer.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and "/" in name:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
