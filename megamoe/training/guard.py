"""Stops a run that no longer learns: gradients that are never finite, or a loss that jumps."""

import math

from megamoe.config.schema import RunConfig
from megamoe.errors import DivergenceError
from megamoe.moe.health import routing_health
from megamoe.parallel.launch import World
from megamoe.training.callbacks.callback import StepRecord

MEMORY = 0.98
"""Weight of the past in the running mean of the loss."""
SETTLING_STEPS = 20
"""Steps before the running mean is trusted."""


class Guard:
    """Looks at every step of `run`; holds a running mean of the loss where spikes are watched for.

    It costs nothing but numbers that the step has on the host already, except that watching for spikes
    averages the loss over ranks at every step.
    """

    def __init__(self, run: RunConfig, world: World) -> None:
        self.run, self.world = run, world
        self._skipped_in_a_row = 0
        self._steps = 0
        self._mean_loss = 0.0

    def check(self, record: StepRecord) -> None:
        """Take in a step. What is decided is equal on all ranks.

        Raises:
            DivergenceError: `training.max_skipped_steps` updates in a row were skipped because gradients
                were not finite, or the loss exceeds `training.spike_factor` times its running mean.
        """
        limit = self.run.training.max_skipped_steps
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.skipped else 0
        if self._skipped_in_a_row >= limit:
            raise self._diverged(
                record,
                f"training.max_skipped_steps = {limit}",
                "that many updates in a row were skipped: gradients were not finite; lower optimizer.lr",
            )
        if self.run.training.spike_factor:
            self._check_spike(record, float(self.world.mean(record.loss)))

    def _check_spike(self, record: StepRecord, loss: float) -> None:
        factor = self.run.training.spike_factor
        if self._steps >= SETTLING_STEPS and loss > factor * self._mean_loss:
            raise self._diverged(
                record, f"training.spike_factor = {factor:g}",
                f"the loss {loss:.4f} exceeds that many times its running mean {self._mean_loss:.4f};"
                " resume from a checkpoint before it with a lower optimizer.lr",
            )  # fmt: skip
        if math.isfinite(loss):
            memory = MEMORY if self._steps else 0.0
            self._mean_loss = memory * self._mean_loss + (1 - memory) * loss
            self._steps += 1

    def _diverged(self, record: StepRecord, what: str, why: str) -> DivergenceError:
        health = routing_health(record.routings, self.run.moe.n_experts)
        loads = ", ".join(f"{layer.max_over_mean:.2f}" for layer in health) or "none"
        return DivergenceError(
            f"{what}: {why} (step {record.step}, loss {float(record.loss):.4f}, gradient norm"
            f" {float(record.grad_norm):.4g}, largest over mean load of each mixture layer: {loads})"
        )
