"""Bytes of weights, gradients and optimizer states in a live engine, each storage counted once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.side_by_side.space import storages
from megamoe.parallel.engine import Engine

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
"""Phases of the training loop, as its heartbeat names them."""


@dataclass(frozen=True)
class States:
    """Bytes that an engine holds on this rank from step to step, padding included.

    Attributes:
        weights: trained parameters, as they compute.
        frozen: frozen parameters and all buffers.
        optimizer: moments, fp32 masters, and Adam's counts of steps.
    """

    weights: int
    frozen: int
    optimizer: int


def states(engine: Engine) -> States:
    """What `engine` holds after a step."""
    model, adam = engine.model, engine.deepspeed.basic_optimizer
    weights = storages(p for p in model.parameters() if p.requires_grad)
    frozen = storages([*(p for p in model.parameters() if not p.requires_grad), *model.buffers()])
    moments = [value for state in adam.state.values() for value in state.values()]
    optimizer = storages(value for value in (*moments, *_updated(adam)) if isinstance(value, torch.Tensor))
    # At stage 0 what Adam updates are the weights themselves.
    optimizer = {place: size for place, size in optimizer.items() if place not in weights}
    return States(sum(weights.values()), sum(frozen.values()), sum(optimizer.values()))


def _updated(adam: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors that Adam updates: masters under ZeRO."""
    for group in adam.param_groups:
        yield from group["params"]


class GradientWatch:
    """The most bytes of gradients that an engine holds, within a ``with`` block.

    They are looked at whenever a parameter's gradient is complete, before each reduction (see
    `TrafficCounter.look`), and when Adam starts.

    Attributes:
        gradients: most while autograd computes them and when the update begins, without what waits in
            buckets.
        reducing: most of gradients, buckets and flat copies together, while they are reduced.
        updating: most while Adam updates one group after another, flat copies for it included.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gradients = self.reducing = self.updating = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        adam = self.engine.deepspeed.basic_optimizer
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _: self._look())
            for parameter in self.engine.model.parameters()
            if parameter.requires_grad
        ]
        self._handles.append(adam.register_step_pre_hook(lambda *_: self._look_while_updating()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def look(self, phase: str, reduced: Sequence[torch.Tensor]) -> None:
        """Compare the present with the most so far.

        Args:
            phase: what the loop does.
            reduced: tensors that are about to be reduced.
        """
        gradients, buckets = self._present()
        together = gradients | buckets | storages(reduced)
        self.reducing = max(self.reducing, sum(together.values()))
        if phase == UPDATE:
            self._look()

    def _look(self) -> None:
        gradients, _ = self._present()
        self.gradients = max(self.gradients, sum(gradients.values()))

    def _look_while_updating(self) -> None:
        gradients, _ = self._present()
        flat = storages(_gradients(_updated(self.engine.deepspeed.basic_optimizer)))
        self.updating = max(self.updating, sum((gradients | flat).values()))

    def _present(self) -> tuple[dict[int, int], dict[int, int]]:
        """Storages of gradients and of buckets."""
        zero = self.engine.deepspeed.optimizer
        buckets = storages(
            buffer for bucket in getattr(zero, "ipg_buckets", {}).values() for buffer in bucket.buffer
        )
        held = storages(self._held(zero))
        return {place: size for place, size in held.items() if place not in buckets}, buckets

    def _held(self, zero: Any) -> Iterator[torch.Tensor]:
        """Gradients, wherever DeepSpeed keeps them."""
        yield from _gradients(self.engine.model.parameters())
        partition = getattr(zero, "grads_in_partition", None)
        if partition is not None:
            yield partition
        for name in ("averaged_gradients", "all_grad_tensors"):
            for tensors in getattr(zero, name, {}).values():
                yield from tensors or ()


def _gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (parameter.grad for parameter in parameters if parameter.grad is not None)
