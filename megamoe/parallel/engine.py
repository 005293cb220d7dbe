"""The adapter between a training loop and DeepSpeed's engine."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import nn

from megamoe.config.schema import RunConfig
from megamoe.errors import DistributedError
from megamoe.models.transformer_xl import ModelOutput, TransformerXL
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout, layout_of
from megamoe.parallel.launch import World
from megamoe.parallel.layer import moe_layer_builder
from megamoe.parallel.optimizer import build_optimizer, parameter_groups


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping; None where DeepSpeed does not compute it,
            which is at ZeRO stage 0.
        skipped: gradients were not finite on some rank, so no rank changed its weights.
    """

    grad_norm: float | None
    skipped: bool


class _EngineModel(TransformerXL):
    """The model in the form DeepSpeed can follow: it looks for tensors in tuples, not in dataclasses.

    It prepares its gradient reduction in a hook on the tensors that the forward pass returns.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ModelOutput]:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        return output.loss_BS, output


class Engine:
    """A model under DeepSpeed: groups, ZeRO, precision, accumulation and clipping are DeepSpeed's.

    One optimizer step is `micro_batches` times `forward` and `backward`, then one `step`.

    Args:
        run: the run.
        ds_config: as `resolve_ds_config` returns it.
        world: the ranks, as `start` returns them.
        vocab_size: symbols of the data.

    Attributes:
        layout: how the run is laid out over ranks.
        device: where tensors go.
        rows: streams of the global batch that this rank reads; micro-batch i takes the i-th
            `layout.micro_batch_size` of them.
        micro_batches: forward and backward passes per optimizer step.
        deepspeed: DeepSpeed's engine, for this room and checkpoints only.

    Raises:
        DistributedError: the ranks hold different frozen hypernetworks.
    """

    def __init__(self, run: RunConfig, ds_config: Mapping[str, Any], world: World, vocab_size: int) -> None:
        self.layout: Layout = layout_of(run, ds_config, world.world_size)
        self.device = world.device
        self.rows = self.layout.rows(world.rank)
        self.micro_batches = self.layout.accumulation
        model = build_model(run, self.layout, world, vocab_size)
        require_equal_buffers(model, world)
        groups = parameter_groups(model, run.optimizer.weight_decay)
        optimizer = build_optimizer(groups, run.optimizer, ds_config, Device.detect())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(dict(ds_config))
        )

    @property
    def model(self) -> TransformerXL:
        """The model that DeepSpeed trains."""
        return self.deepspeed.module

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """`TransformerXL.forward` through DeepSpeed."""
        loss_BS, output = self.deepspeed(*args, **kwargs)
        return replace(output, loss_BS=loss_BS)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch, whose mean loss is the scalar `loss`.

        DeepSpeed divides it by `micro_batches` and averages over ranks.
        """
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self) -> StepResult:
        """Clip and apply the gradients of `micro_batches` calls of `backward`."""
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(
            grad_norm=None if norm is None else float(norm),
            skipped=not self.deepspeed.was_step_applied(),
        )

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` from the next step on, in all groups."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def train(self) -> None:
        """Dropout and routing noise on."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Deterministic from here on."""
        self.deepspeed.eval()


def build_model(run: RunConfig, layout: Layout, world: World, vocab_size: int) -> TransformerXL:
    """The model of a run with this rank's share of the experts."""
    model = _EngineModel(
        replace(run.model, vocab_size=vocab_size),
        run.moe,
        seed=run.training.seed,
        build_moe_layer=moe_layer_builder(layout, world.rank),
        mean_over_ranks=world.mean,
    )
    model.set_activation_checkpointing(run.training.activation_checkpointing)
    return model


def require_equal_buffers(model: nn.Module, world: World) -> None:
    """Compare the buffers of all ranks: DeepSpeed broadcasts parameters but no buffers.

    Raises:
        DistributedError: a rank holds another value than rank 0.
    """
    digests = world.gather_objects(_digest_of_buffers(model))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise DistributedError(
            f"ranks {different}: their frozen buffers differ from rank 0's; start all ranks with the same"
            " training.seed, megamoe and torch"
        )


def _digest_of_buffers(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, buffer in model.named_buffers():
        digest.update(name.encode())
        digest.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
