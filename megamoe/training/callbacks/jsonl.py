"""metrics.jsonl while training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megamoe.training.callbacks.callback import Callback
from megamoe.training.evaluation import Evaluation
from megamoe.training.metrics_file import drop_after, to_line

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class JsonlCallback(Callback):
    """Appends each log interval and each evaluation, flushed line by line.

    A resumed run first drops the lines that it will write again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Open the file at the step the run starts from."""
        drop_after(self.path, trainer.step, trainer.run.training.max_steps)
        self._file = self.path.open("a", encoding="utf-8")

    def on_log(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """Write the interval."""
        self._write(metrics)

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Write the figures of the split."""
        self._write({"step": trainer.step, "tokens": trainer.tokens} | evaluation.metrics())

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(to_line(values))
            self._file.flush()
