"""Routing health of each mixture layer on every log line."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from megamoe.moe.health import Churn, agreement, routing_health
from megamoe.moe.routers import router_class
from megamoe.moe.routing import Routing
from megamoe.training.callbacks.callback import Callback, StepRecord

if TYPE_CHECKING:
    from megamoe.training.trainer import Trainer


class HealthCallback(Callback):
    """Adds ``routing/layer_3/max_over_mean`` and so on; belongs on every rank.

    Loads are those of the step's last micro-batch over all ranks. Churn is that of a fixed probe of
    held-out text, `Trainer.probe`, routed in evaluation mode at each log line.
    """

    def __init__(self) -> None:
        self._churn = Churn()
        self._probe: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: "Trainer") -> None:
        """Take the probe."""
        self._probe = trainer.probe()

    def measure(self, trainer: "Trainer", record: StepRecord) -> dict[str, Any]:
        """Health by layer; the worst balance of any layer; agreement of neighbouring layers on the probe."""
        moe = trainer.run.moe
        if not record.routings or router_class(moe.router.name).owns_feed_forward:
            return {}
        layers = routing_health(record.routings, moe.n_experts, trainer.world.sum)
        probed = self._route_probe(trainer)
        churn = self._churn.look(probed, trainer.world.mean)
        figures: dict[str, Any] = {
            "routing/max_over_mean": max(layer.max_over_mean for layer in layers),
            "routing/agreement": agreement(probed, trainer.world.mean),
        }
        indices = moe.layer_indices(trainer.run.model.n_layers)
        for place, (index, layer) in enumerate(zip(indices, layers, strict=True)):
            values = asdict(layer) | {"churn": churn[place] if churn else None}
            figures |= {f"routing/layer_{index}/{name}": value for name, value in values.items()}
        return figures

    @torch.no_grad()
    def _route_probe(self, trainer: "Trainer") -> tuple[Routing, ...]:
        engine = trainer.engine
        engine.eval()
        try:
            return engine.forward(**self._probe, step=trainer.step).routings
        finally:
            engine.train()
