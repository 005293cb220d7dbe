"""One way of serving, measured in a process of its own: what it costs and what it says."""

import gc
import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe.checkpoint.load import load_model
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.experts import Experts
from megamoe.parallel.device import Device
from megamoe.serve.budget import Budget
from megamoe.serve.offload import OffloadedModel
from megamoe.serve.predictor_file import load_predictor
from megamoe.serve.prefetch import PredictedRouter, Prefetcher
from megamoe.serve.workload import Announce, Reading, read_aloud

RESIDENT, ON_DEMAND, HINT, ORACLE, REPLACE = MODES = ("resident", "ondemand", "hint", "oracle", "replace")

Calls = Sequence[Sequence[Sequence[int]]]
"""Of each layer the experts that each of its calls needs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        checkpoint: the model.
        ids_N: the text.
        reading: how it is read.
        mode: one of `MODES`.
        budget: memory for experts; None in mode resident.
        policy: which expert makes room.
        predictor: folder, for the modes hint and replace.
        calls: for the mode oracle.
    """

    checkpoint: Path
    ids_N: "np.ndarray[Any, Any]"
    reading: Reading
    mode: str
    budget: Budget | None = None
    policy: str = "lru"
    predictor: Path | None = None
    calls: Calls = ()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What it came to.

    Attributes:
        seconds: for the text.
        nats: mean loss per token.
        losses_sha256: of the losses of all tokens, to tell whether they are the same bit for bit.
        floor_bytes: memory of the process before the model is loaded.
        peak_bytes: most memory of the process while it reads.
        n_slots: in each layer; None in mode resident.
        slot_bytes: of the slots of all layers; in mode resident of all experts.
        traffic: fields of `Traffic`, and `hit_rate`; empty in mode resident.
        calls: experts needed by each call of each layer, in mode ondemand alone.
    """

    seconds: float
    nats: float
    losses_sha256: str
    floor_bytes: int
    peak_bytes: int
    n_slots: int | None
    slot_bytes: int
    traffic: dict[str, float]
    calls: Calls = ()


def measure(task: Task) -> Measured:
    """Load, read, count; in a process that does nothing else.

    Raises:
        MegaMoEError: the model or the predictor cannot be loaded, or the budget is too small.
    """
    floor_bytes = resident_bytes()
    if task.budget is None:
        model: TransformerXL = load_model(task.checkpoint).to(Device.detect().kind)
        experts = [layer.experts for layer in model.moe_layers if isinstance(layer.experts, Experts)]
        slot_bytes = sum(stack.nbytes for held in experts for stack in held.weights)
        return replace(_read(model, task, lambda ids_1S: None, floor_bytes), slot_bytes=slot_bytes)
    offloaded = OffloadedModel(
        task.checkpoint, task.budget, task.policy, in_background=task.mode != ON_DEMAND
    )
    for slots in offloaded.slots:
        slots.calls = []
    measured = _read(offloaded.model, task, _announcer(task, offloaded), floor_bytes)
    offloaded.close()
    traffic = offloaded.traffic
    return replace(
        measured,
        n_slots=offloaded.slots[0].n_slots,
        slot_bytes=offloaded.n_bytes,
        traffic=vars(traffic) | {"hit_rate": traffic.hit_rate},
        calls=[slots.calls or [] for slots in offloaded.slots] if task.mode == ON_DEMAND else (),
    )


def _read(model: TransformerXL, task: Task, announce: Announce, floor_bytes: int) -> Measured:
    ids_N = torch.from_numpy(task.ids_N.astype(np.int64)).to(model.attention_bias_u.device)
    gc.collect()
    forget_peak()
    begin = time.perf_counter()
    losses_N = read_aloud(model, ids_N, task.reading, announce).cpu()
    return Measured(
        seconds=time.perf_counter() - begin,
        nats=losses_N.double().mean().item(),
        losses_sha256=hashlib.sha256(losses_N.numpy().tobytes()).hexdigest(),
        floor_bytes=floor_bytes,
        peak_bytes=peak_bytes(),
        n_slots=None,
        slot_bytes=0,
        traffic={},
    )


def _announcer(task: Task, offloaded: OffloadedModel) -> Announce:
    """What is done with a piece of the text before the model reads it."""
    if task.mode == ORACLE:
        calls = [iter(of_layer) for of_layer in task.calls]

        def expect_needed(ids_1S: torch.Tensor) -> None:
            for slots, of_layer in zip(offloaded.slots, calls, strict=True):
                slots.expect(next(of_layer, ()))

        return expect_needed
    if task.mode == ON_DEMAND:
        return lambda ids_1S: None
    assert task.predictor is not None
    model, top_k = offloaded.model, task.reading.top_k
    predictor = load_predictor(task.predictor, model)
    if task.mode == HINT:
        return Prefetcher(predictor, model, offloaded.slots, top_k).read
    prefetcher = Prefetcher(predictor, model, offloaded.slots, top_k)
    routers = [PredictedRouter() for _ in offloaded.slots]
    for layer, router in zip(model.moe_layers, routers, strict=True):
        layer.router = router  # type: ignore[assignment]

    def route(ids_1S: torch.Tensor) -> None:
        for router, logits_TE in zip(routers, prefetcher.read(ids_1S), strict=True):
            router.upcoming.append(logits_TE)

    return route


def resident_bytes() -> int:
    """Memory of this process in RAM, of mapped files too."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that `resident_bytes` has been since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak begin from what is in RAM now."""
    with suppress(OSError):  # where it may not be forgotten, loading counts too
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
