"""What stays of a finished run: results.json, the image, and where everything is."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.training.callbacks.callback import Callback
from megamoe.training.callbacks.console import ConsoleCallback
from megamoe.training.evaluation import Evaluation
from megamoe.training.plots import plot_run
from megamoe.training.run_folder import write_json

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class ResultsCallback(Callback):
    """Writes results.json and plots/curves.png at the end. Place it after the metrics file's callback."""

    def __init__(self, console: ConsoleCallback) -> None:
        self.console = console

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Keep the test figures."""
        if evaluation.split == "test":
            write_json(
                trainer.folder.results,
                {"run": trainer.run.name, "steps": trainer.step, "best_step": trainer.best_step}
                | evaluation.to_dict(),
            )

    def on_train_end(self, trainer: "Trainer") -> None:
        """Draw, and say where everything is and what to do next."""
        folder, corpus = trainer.folder, trainer.corpus
        image = plot_run(
            folder.metrics, folder.curves, title=f"{trainer.run.name} on {corpus.name}",
            metric=corpus.metric, loss_metric=corpus.loss_metric,
        )  # fmt: skip
        # A run that starts from the last step of another, or whose validation is never finite, has no best.
        best = trainer.best_step is not None
        weights = folder.best if best else trainer.last_checkpoint
        figure = "best validation accuracy" if corpus.metric == "accuracy" else "the lowest validation loss"
        which = f"weights with {figure}" if best else "weights of the last step"
        lines = [
            f"\n{which:<39}  {weights}",
            f"{'figures and curves':<39}  {folder.results}, {image}",
            f"{'everything that was measured':<39}  {folder.metrics}\n",
            f"next: {_script('megamoe')} evaluate {weights}  # score it again, at any k",
        ]
        if trainer.run.logging.tensorboard:
            lines.append(f"      {_script('tensorboard')} --logdir {folder.tensorboard}")
        self.console.show("\n".join(lines))


def _script(name: str) -> str:
    """How to call a script of this environment here: by its name alone if the shell would find it."""
    ours, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not ours.exists() or (found and ours.samefile(found)):
        return name
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)
