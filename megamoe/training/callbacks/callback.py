"""What a training loop tells its observers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megamoe.moe.routing import Routing
from megamoe.training.evaluation import Evaluation

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did. Tensors are left on the device, so that looking at none costs nothing.

    Attributes:
        step: steps done, this one included.
        lr: learning rate of the update.
        top_k: experts per token in force.
        loss: this rank's mean loss, nats per token, without auxiliary losses; a scalar tensor.
        auxiliary: this rank's unweighted auxiliary losses by name; scalar tensors.
        grad_norm: global gradient norm before clipping; a scalar tensor.
        skipped: the update was left out because gradients were not finite.
        tokens: predictions over all ranks.
        routings: decisions of each mixture layer in the last micro-batch of this rank.
    """

    step: int
    lr: float
    top_k: int
    loss: torch.Tensor
    auxiliary: dict[str, torch.Tensor]
    grad_norm: torch.Tensor
    skipped: bool
    tokens: int
    routings: tuple[Routing, ...]


class Callback:
    """Base of everything that watches a run. Hooks do nothing by default.

    Hooks run in the order of `Trainer.callbacks`. Those that use collectives must be on every rank.
    """

    def on_train_start(self, trainer: "Trainer") -> None:
        """Everything is built and, if asked for, resumed; no step is done yet."""

    def measure(self, trainer: "Trainer", record: StepRecord) -> dict[str, Any]:
        """Figures to add to the log line of this step, named ``group/name``."""
        return {}

    def on_log(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """A log interval is complete. `metrics` are over all ranks, except times and memory."""

    def on_evaluation(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """Held-out text was scored; the trainer already knows whether it is the best so far."""

    def on_step_end(self, trainer: "Trainer", record: StepRecord) -> None:
        """A step is complete, its log line and its evaluation included."""

    def on_checkpoint(self, trainer: "Trainer", folder: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """The last step is done."""

    def on_error(self, trainer: "Trainer", error: BaseException) -> None:
        """Training stops because of `error`, which is raised again afterwards."""
