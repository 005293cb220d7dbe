"""What happened since the last log line."""

import resource
import sys
from collections import defaultdict
from typing import Any

import torch

from megamoe.parallel.launch import World
from megamoe.training.callbacks.callback import StepRecord
from megamoe.training.evaluation import in_metric


class Window:
    """Sums over the steps of one log interval, left on the device until they are asked for."""

    def __init__(self) -> None:
        self._steps = 0
        self._skipped = 0
        self._tokens = 0
        self._seconds = 0.0
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, record: StepRecord, seconds: float) -> None:
        """Take in a step that took `seconds`, evaluation and saving not included."""
        self._steps += 1
        self._skipped += record.skipped
        self._tokens += record.tokens
        self._seconds += seconds
        self._losses["train/loss"].append(record.loss)
        for name, value in record.auxiliary.items():
            self._losses[f"auxiliary/{name}"].append(value)

    def figures(self, record: StepRecord, world: World, metric: str) -> dict[str, Any]:
        """Figures of the interval that `record` ends, named ``group/name``; every rank must ask.

        Losses are means over steps and ranks; the gradient norm is that of `record`.
        """
        values = {name: torch.stack(losses).double().mean() for name, losses in self._losses.items()}
        # Equal on all ranks; among the losses it costs no further wait for the device.
        values["train/grad_norm"] = record.grad_norm.double()
        means = world.mean(torch.stack(list(values.values()))).tolist()
        figures: dict[str, Any] = dict(zip(values, means, strict=True))
        return figures | {
            f"train/{metric}": in_metric(figures["train/loss"], metric),
            "train/lr": record.lr,
            "train/top_k": record.top_k,
            "train/skipped_steps": self._skipped,
            "train/tokens_per_second": self._tokens / self._seconds,
            "time/step_seconds": self._seconds / self._steps,
            "memory/peak_gib": _peak_memory_gib(world.device),
        }


def _peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held: of its GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
