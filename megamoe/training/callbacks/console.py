"""What a person watching the run sees: a progress bar on a terminal, aligned lines elsewhere."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from megamoe.errors import LostRankError, StoppedError
from megamoe.training.banner import banner
from megamoe.training.callbacks.callback import Callback
from megamoe.training.evaluation import Evaluation, format_figure
from megamoe.training.report import figures_table
from megamoe.training.terminal import LOG_WIDTH, open_terminal

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer

BESIDE_THE_BAR = ("loss", "lr", "speed", "load", "eta")
"""What fits beside the bar where a terminal is 80 columns wide; the log has all."""


class ConsoleCallback(Callback):
    """Shows the banner, progress, evaluations and the end of a run; `log` gets the same as plain lines."""

    def __init__(self, log: Path, terminal: Console | None = None) -> None:
        self.log = log
        self.terminal = terminal or open_terminal()
        self._bar: Progress | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        """Show every derived quantity, then the bar."""
        self.show(banner(trainer.describe()))
        self.start_bar(trainer)

    def start_bar(self, trainer: "Trainer") -> None:
        """Show a progress bar where there is a terminal."""
        if self.terminal.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=max(4, min(40, self.terminal.width - 76))),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.description}"),
                console=self.terminal,
            )
            self._bar.add_task("starting", total=trainer.run.training.max_steps, completed=trainer.step)
            self._bar.start()

    def on_log(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """Move the bar, or write a line."""
        parts = _progress(trainer, metrics)
        if self._bar is not None:
            shown = "  ".join(parts[name].strip() for name in BESIDE_THE_BAR if name in parts)
            self._bar.update(self._bar.task_ids[0], completed=trainer.step, description=shown)
        self.show(" | ".join([_step(trainer), *parts.values()]), only_log=self._bar is not None)

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Write the figures at each k: validation as a line, test as a table."""
        if evaluation.split == "test":
            self._stop()
            moe = trainer.run.moe
            self.show("")
            self.show(figures_table(evaluation, n_experts=moe.n_experts, top_k=moe.top_k))
            return
        figures = ", ".join(
            format_figure(evaluation.figure(k), evaluation.metric) + (f" at k = {k}" if k else "")
            for k in evaluation.nats
        )
        best = " (best so far)" if trainer.best_step == trainer.step else ""
        self.show(f"{_step(trainer)} | validation: {figures}{best}")

    def on_checkpoint(self, trainer: "Trainer", folder: Path) -> None:
        """Note it in the log alone."""
        self.show(f"{_step(trainer)} | saved {folder}", only_log=True)

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        """Free the terminal and say what is left; the error itself is told by whoever catches it."""
        self._stop()
        reason = _reason(error)
        if str(error) not in ("", reason):
            self.show(f"{_step(trainer)} | {error}", only_log=True)
        if trainer.last_checkpoint is not None:
            what = f"last checkpoint: {trainer.last_checkpoint}; the same command goes on from there"
        else:
            what = "no checkpoint was written yet"
        self.show(f"{_step(trainer)} | {reason}; {what}")

    def show(self, what: RenderableType, *, only_log: bool = False) -> None:
        """Print to the terminal and, as plain text, into the log."""
        plain = isinstance(what, str)  # brackets in it are brackets
        text = io.StringIO()
        for console in (Console(file=text, width=LOG_WIDTH), *([] if only_log else [self.terminal])):
            console.print(what, highlight=False, markup=not plain, soft_wrap=plain)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text.getvalue())

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _reason(error: BaseException) -> str:
    if isinstance(error, StoppedError | LostRankError):
        return str(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped by an error"


def _step(trainer: "Trainer") -> str:
    total = trainer.run.training.max_steps
    return f"step {trainer.step:>{len(str(total))}}/{total}"


def _progress(trainer: "Trainer", metrics: dict[str, Any]) -> dict[str, str]:
    """What a line says, by name, in its order."""
    metric = trainer.corpus.loss_metric
    parts = {
        "loss": f"{format_figure(metrics[f'train/{metric}'], metric):>11}",
        "lr": f"lr {metrics['train/lr']:.2e}",
        "grad": f"grad {metrics['train/grad_norm']:6.3f}",
        "speed": f"{metrics['train/tokens_per_second'] / 1000:6.1f}k tok/s",
    }
    if "routing/max_over_mean" in metrics:
        parts["k"] = f"k {metrics['train/top_k']:>2}"
        parts["load"] = f"load {metrics['routing/max_over_mean']:.2f}x"
    if metrics["train/skipped_steps"]:
        parts["skipped"] = f"skipped {metrics['train/skipped_steps']}"
    return parts | {"eta": f"ETA {_clock(metrics['time/eta_seconds'])}"}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
