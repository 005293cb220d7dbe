"""Which part of which global tensor a rank holds, for saving and restoring at any topology.

A rank's experts are a contiguous range of the global tensor, and so is a ZeRO partition of any tensor.
Whatever a rank holds in fp32 is therefore one flat range ``[start, stop)`` per parameter. Only
`publish_weights` communicates.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import nn

from megamoe.errors import CheckpointError
from megamoe.parallel.placement import Shape, placements, saved_buffers

MOMENTS = ("exp_avg", "exp_avg_sq")
# Owners of a replicated tensor share it out in parts of at least this many elements.
_SMALLEST_PART = 1 << 16

Read = Callable[[str, str, int, int], torch.Tensor]
"""``read(kind, name, start, stop)`` is that flat range of the global tensor."""


class TrainingEngine(Protocol):
    """What is needed of `megamoe.parallel.engine.Engine`."""

    @property
    def model(self) -> nn.Module:
        """The model whose parameter paths are the global names."""
        ...

    @property
    def deepspeed(self) -> Any:
        """The `deepspeed.DeepSpeedEngine` that trains it."""
        ...


@dataclass(frozen=True)
class Fragment:
    """A flat range of one global tensor.

    Attributes:
        name: global name, the path of the parameter or buffer in the model.
        global_shape: shape of the whole tensor.
        start: first element of the range.
        stop: element after its last.
        tensors: by kind (weight, exp_avg, exp_avg_sq, buffer) the range's values, 1-D views.
    """

    name: str
    global_shape: Shape
    start: int
    stop: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Span:
    """Elements start..stop of a local parameter, whose fp32 master lies at `offset` of `flat`."""

    parameter: nn.Parameter
    start: int
    stop: int
    flat: torch.Tensor
    offset: int
    replicated: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The span's elements of `tensor`, which is laid out as `flat` is."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.stop - self.start)

    def part(self, index: int, count: int) -> "_Span":
        """The share of replica `index` of `count`."""
        start, stop = _part(self.stop - self.start, index, count)
        return replace(self, start=self.start + start, stop=self.start + stop, offset=self.offset + start)


def owned_fragments(engine: TrainingEngine) -> Iterator[Fragment]:
    """What this rank must write. Over all ranks every element of every tensor comes exactly once.

    Moments are left out before the first optimizer step, when there are none.

    Raises:
        CheckpointError: the engine keeps its weights in a way that is not known here.
    """
    placed, names = placements(engine.model), _names(engine.model)
    states = engine.deepspeed.basic_optimizer.state
    for held in _spans(engine.deepspeed):
        span = held.part(*_replica(engine.deepspeed, held.parameter)) if held.replicated else held
        if span.start == span.stop:
            continue
        name = names[span.parameter]
        shape, origin = placed[name]
        state = states.get(span.flat, {})
        tensors = {"weight": span.of(span.flat)}
        tensors |= {kind: span.of(state[kind]) for kind in MOMENTS if kind in state}
        yield Fragment(name, shape, origin + span.start, origin + span.stop, tensors)
    for name, buffer in saved_buffers(engine.model).items():
        start, stop = _part(buffer.numel(), dist.get_rank(), dist.get_world_size())
        if start < stop:
            values = buffer.detach().reshape(-1)[start:stop]
            yield Fragment(name, tuple(buffer.shape), start, stop, {"buffer": values})


def restore_fragments(engine: TrainingEngine, read: Read, *, optimizer_step: int) -> None:
    """Set this rank's fp32 weights, moments and buffers to what `read` gives.

    `publish_weights` must follow, on all ranks.

    Args:
        read: source of values; asked only for ranges that this rank holds.
        optimizer_step: updates behind the moments, for Adam's bias correction. 0 reads no moments and
            starts Adam afresh.
    """
    placed, names = placements(engine.model), _names(engine.model)
    optimizer = engine.deepspeed.basic_optimizer
    for span in _spans(engine.deepspeed):
        name = names[span.parameter]
        origin = placed[name][1]
        where = (name, origin + span.start, origin + span.stop)
        span.of(span.flat).copy_(read("weight", *where))
        if not span.parameter.requires_grad:
            continue
        state = _adam_state(optimizer, span.flat, optimizer_step)
        for kind in MOMENTS:
            if optimizer_step:
                span.of(state[kind]).copy_(read(kind, *where))
            elif kind in state:
                state[kind].zero_()
    for name, buffer in saved_buffers(engine.model).items():
        buffer.copy_(read("buffer", name, 0, buffer.numel()).view_as(buffer))


def publish_weights(engine: TrainingEngine) -> None:
    """Make the weights that forward passes use equal the restored fp32 weights, on all ranks."""
    optimizer = engine.deepspeed.optimizer
    if engine.deepspeed.zero_optimization_stage() == 3:
        _publish_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    # At stage 0 the fp32 weights are the ones that compute.


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _part(numel: int, index: int, count: int) -> tuple[int, int]:
    """The range of `numel` elements that replica `index` of `count` writes; may be empty."""
    share = max(math.ceil(numel / count), _SMALLEST_PART)
    return min(index * share, numel), min((index + 1) * share, numel)


def _replica(engine: Any, parameter: Any) -> tuple[int, int]:
    """Index of this rank among those that hold the same values of `parameter`, and their number."""
    group = engine.data_parallel_group
    if is_moe_param(parameter):
        group = groups._get_expert_data_parallel_group(parameter.group_name)
    return dist.get_rank(group=group), dist.get_world_size(group=group)


def _spans(engine: Any) -> Iterator[_Span]:
    """Everything this rank holds in fp32, whichever optimizer DeepSpeed chose."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    parameters = list(engine.module.parameters())
    whole = [p for p in parameters if not p.requires_grad]  # held by every replica, in one piece
    if stage == 3 and whole:
        raise CheckpointError("frozen parameters at ZeRO stage 3: cannot be saved; use stage 1 or 2")
    if stage == 3:
        yield from (span for p in parameters for span in _stage_3_span(optimizer, p))
    elif hasattr(optimizer, "update_lp_params"):
        yield from _stage_1_2_spans(optimizer)
    elif optimizer is engine.basic_optimizer:
        whole = parameters
    else:
        kind = type(optimizer).__name__
        raise CheckpointError(f"{kind}: weights that it keeps cannot be saved; use ZeRO stage 1 or 2")
    yield from (_Span(p, 0, p.numel(), p, 0, replicated=True) for p in whole)


def _stage_1_2_spans(optimizer: Any) -> Iterator[_Span]:
    """DeepSpeed's own map from parameters to masters (`_hp_mapping`) errs with round_robin_gradients."""
    if hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer, which lays parameters out as they come
        members = optimizer.bf16_groups
        offsets = [[0, *itertools.accumulate(p.numel() for p in group)][:-1] for group in members]
    else:
        members, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    flats = [group["params"][0] for group in optimizer.param_groups]
    for flat, replicas, *layout in zip(flats, optimizer.real_dp_process_group, members, offsets, strict=True):
        begin = dist.get_rank(group=replicas) * flat.numel()
        for parameter, offset in zip(*layout, strict=True):
            start = max(begin, offset)
            stop = min(begin + flat.numel(), offset + parameter.numel())
            if start < stop:
                yield _Span(parameter, start - offset, stop - offset, flat, start - begin)


def _stage_3_span(optimizer: Any, parameter: Any) -> Iterator[_Span]:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * dist.get_rank(group=parameter.ds_process_group)
    stop = min(start + size, parameter.ds_numel)
    if start < stop:
        yield _Span(parameter, start, stop, optimizer.fp32_partitioned_groups_flat[group], offset)


def _publish_stage_3(optimizer: Any) -> None:
    optimizer.checkpoint_event_prologue()
    masters, weights = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    for group, (master, weight) in enumerate(zip(masters, weights, strict=True)):
        weight.data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def _adam_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor, step: int) -> dict[str, Any]:
    """Adam's state of `flat`, at `step`; made if it does not exist and is needed."""
    state = optimizer.state.get(flat, {})
    if not state and not step:
        return state
    state = optimizer.state[flat]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(flat)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        state["step"] = torch.tensor(float(step), device=flat.device if on_device else "cpu")
    else:
        # DeepSpeed's Adam counts in plain integers beside the moments, Apex's in the group.
        state["step"] = step
        for group in optimizer.param_groups:
            group["step"] = step
    return state
