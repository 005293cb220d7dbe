"""The learning rate of a step. No torch: a schedule is a function, and its only state is `Plateau`."""

import math
from dataclasses import dataclass

from megamoe.config.schema import OptimizerConfig

IMPROVEMENT = 1e-4
"""Relative fall of the validation loss that counts as an improvement."""


@dataclass
class Plateau:
    """What the plateau schedule remembers; it belongs into the checkpoint.

    Attributes:
        factor: the rate's present share of `optimizer.lr`.
        best: lowest validation loss so far, nats; None before the first evaluation.
        waited: evaluations in a row without improvement.
    """

    factor: float = 1.0
    best: float | None = None
    waited: int = 0

    def observe(self, loss: float, optimizer: OptimizerConfig) -> None:
        """Take in a validation loss; past `patience` without improvement the rate falls by `decay_rate`."""
        if math.isfinite(loss) and (self.best is None or loss < self.best * (1 - IMPROVEMENT)):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > optimizer.patience:
            self.factor *= optimizer.decay_rate
            self.waited = 0


def learning_rate(
    optimizer: OptimizerConfig, step: int, max_steps: int, plateau: Plateau | None = None
) -> float:
    """The rate of the update that follows `step` done updates.

    Warm-up of W steps rises linearly from 0 at step 0; then, with rate r and s = step:

    * cosine: min_lr + (r - min_lr) (1 + cos(pi s / max_steps)) / 2
    * inv_sqrt: r / sqrt(max(s, 1)), which the warm-up meets at s = W
    * plateau: max(min_lr, r * plateau.factor)
    * constant: r
    """
    warmup = optimizer.warmup_steps
    if step >= warmup:
        return _after_warmup(optimizer, step, max_steps, plateau)
    peak = optimizer.lr
    if optimizer.schedule == "inv_sqrt":
        peak = _after_warmup(optimizer, warmup, max_steps, plateau)
    return peak * step / warmup


def _after_warmup(optimizer: OptimizerConfig, step: int, max_steps: int, plateau: Plateau | None) -> float:
    peak, floor = optimizer.lr, optimizer.min_lr
    if optimizer.schedule == "cosine":
        progress = min(step, max_steps) / max_steps
        return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
    if optimizer.schedule == "inv_sqrt":
        return peak / math.sqrt(max(step, 1))
    if optimizer.schedule == "plateau":
        return max(floor, peak * (plateau.factor if plateau else 1.0))
    return peak
