"""The adapter between a training loop and DeepSpeed's engine."""

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import nn

from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError, DistributedError
from megamoe.models.model_of import model_of
from megamoe.models.transformer_xl import Backbone
from megamoe.moe.layer import MoELayer
from megamoe.moe.rooms import room
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout, layout_of
from megamoe.parallel.launch import World
from megamoe.parallel.layer import moe_layer_builder
from megamoe.parallel.optimizer import build_optimizer, parameter_groups


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping, experts of all ranks included; inf where skipped.
            A scalar tensor that is left on the device.
        skipped: gradients were not finite on some rank, so no rank changed its weights.
    """

    grad_norm: torch.Tensor
    skipped: bool


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
        rows: streams of the global batch that this rank reads; see `micro_batch_rows`.
        micro_batches: forward and backward passes per optimizer step.
        deepspeed: DeepSpeed's engine, for this room and checkpoints only.

    Raises:
        ConfigError: DeepSpeed refuses its config.
        DistributedError: the ranks hold different frozen hypernetworks.
    """

    def __init__(self, run: RunConfig, ds_config: Mapping[str, Any], world: World, vocab_size: int) -> None:
        self.layout: Layout = layout_of(run, ds_config, world.world_size)
        self.device = world.device
        self.rows = self.layout.rows(world.rank)
        self.micro_batches = self.layout.accumulation
        require_accepted(ds_config)
        model = build_model(run, self.layout, world, vocab_size)
        require_equal_buffers(model, world)
        if self.layout.zero_stage == 3:
            # A module's parameters are gathered again when gradients reach the tensors it returned. A
            # router returns a `Routing`, so the mixture layer, which returns a tuple, stands for it.
            set_z3_leaf_modules(model, [MoELayer], raise_if_not_found=False)
            # Parameters are fetched ahead in the order of the pass before, if that is the same.
            model.shares_trunk = False
        optimizer = build_optimizer(
            parameter_groups(model, run.optimizer.weight_decay), run.optimizer, ds_config, Device.detect()
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(dict(ds_config))
        )

    @property
    def model(self) -> Backbone:
        """The model that DeepSpeed trains."""
        return self.deepspeed.module

    @property
    def product_dtype(self) -> torch.dtype:
        """The type in which the large matrix products are computed."""
        if self.deepspeed.torch_autocast_enabled():
            return self.deepspeed.torch_autocast_dtype()
        return self.layout.dtype

    def micro_batch_rows(self, index: int) -> range:
        """Streams of the global batch that make up micro-batch `index` of this rank."""
        size = self.layout.micro_batch_size
        return self.rows[index * size : (index + 1) * size]

    def on_device(self, values: torch.Tensor) -> torch.Tensor:
        """A batch's tensor where the model is; copying pinned memory is not waited for."""
        return values.to(self.device, non_blocking=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `forward` through DeepSpeed."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch, whose mean loss is the scalar `loss`.

        DeepSpeed divides it by `micro_batches` and averages over ranks.
        """
        with room("backward"):
            self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self) -> StepResult:
        """Clip and apply the gradients of `micro_batches` calls of `backward`."""
        with room("optimizer"):
            if self.layout.zero_stage == 0:
                return self._step_unsharded()
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()  # a number where it was skipped
            return StepResult(
                torch.as_tensor(norm, device=self.device), not self.deepspeed.was_step_applied()
            )

    def _step_unsharded(self) -> StepResult:
        """DeepSpeed computes no norm at stage 0 and would step on gradients that are not finite.

        To decide on that, the host has to wait for the norm.
        """
        norm = global_grad_norm(self.model)
        if norm.isfinite():
            self.deepspeed.step()
            return StepResult(norm, skipped=False)
        # What DeepSpeed counts when it skips a step itself.
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1
        self.deepspeed.global_samples += self.deepspeed.train_batch_size()
        return StepResult(torch.tensor(math.inf, device=self.device), skipped=True)

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` from the next step on, in all groups."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def close(self) -> None:
        """Let go of the model, which DeepSpeed's hooks would hold for ever; nothing works after it."""
        self.deepspeed.destroy()

    def train(self) -> None:
        """Dropout and routing noise on."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Deterministic from here on."""
        self.deepspeed.eval()


def global_grad_norm(model: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, experts of all ranks included, once gradients are reduced over ranks."""
    shared: list[torch.Tensor] = []
    spread: list[torch.Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            (spread if is_moe_param(parameter) else shared).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(shared) ** 2
    if spread:
        here = torch.nn.utils.get_total_norm(spread) ** 2
        dist.all_reduce(here, group=groups._get_max_expert_parallel_group())
        square = square + here
    return square.sqrt()


def build_model(run: RunConfig, layout: Layout, world: World, vocab_size: int) -> Backbone:
    """The model of a run with this rank's share of the experts."""
    model = model_of(
        replace(run, model=replace(run.model, vocab_size=vocab_size)),
        build_moe_layer=moe_layer_builder(layout, world.rank),
        ranks=world,
    )
    model.set_activation_checkpointing(run.training.activation_checkpointing)
    return model


def require_accepted(ds_config: Mapping[str, Any]) -> None:
    """Let DeepSpeed read its config, in a process group.

    Raises:
        ConfigError: it refuses it.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(dict(ds_config)))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the DeepSpeed config is refused by DeepSpeed: {reason}") from None


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
