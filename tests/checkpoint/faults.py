"""A writer of one rank without DeepSpeed, and cuts at the system calls that it makes."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist

from megamoe.checkpoint.state import TrainingState
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.config import RunConfig
from megamoe.parallel.launch import Launch, World, start

CALLS = {"mkdir", "open", "write", "flush", "fsync", "rename", "unlink", "rmdir"}
"""What changes a file system, as Python's C functions are called."""

Cut = Callable[[], None]


def warm_up() -> None:
    """Do once what takes seconds the first time, so that no child has to."""
    engine_of()
    _ = deepspeed.ops.__compatible_ops__


def join_alone() -> World:
    """A group of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return start(Launch())


def engine_of(n_elements: int = 30) -> Any:
    """An engine as DeepSpeed's is at ZeRO stage 0: two tensors and Adam's moments, all of one value."""
    model = torch.nn.Linear(n_elements, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    raw = SimpleNamespace(
        module=model, optimizer=optimizer, basic_optimizer=optimizer, data_parallel_group=None,
        zero_optimization_stage=lambda: 0, global_steps=1, global_samples=1, skipped_steps=0,
    )  # fmt: skip
    return SimpleNamespace(model=model, deepspeed=raw)


def fill(engine: Any, value: float) -> None:
    """Set every weight."""
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(value)


def save_and_train_on(
    folders: Sequence[Path],
    step: int,
    *,
    background: bool,
    n_elements: int = 30,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Save weights that equal `step`, and change them while they are being written."""
    engine, world = engine_of(n_elements), join_alone()
    fill(engine, step)
    writer = CheckpointWriter(world, background=background)
    before()
    writer.save(folders, engine, TrainingState(step=step), run=RunConfig())
    writer.wait_for_copy()
    fill(engine, -1)
    writer.wait()


def cut_at(number: int, cut: Cut) -> None:
    """From here on, call `cut` before the n-th call, in any thread, that changes the file system."""
    count = 0

    def profile(_frame: Any, event: str, function: Any) -> None:
        nonlocal count
        if event != "c_call" or function.__name__ not in CALLS:
            return
        if function.__name__ in ("write", "flush") and not isinstance(function.__self__, io.BufferedWriter):
            return
        count += 1
        if count == number:
            cut()

    threading.setprofile(profile)
    sys.setprofile(profile)


def kill() -> None:
    """What a scheduler does to a job that is preempted for good."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """What a full disk does to a call."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(action: Callable[[], None]) -> tuple[bool, str]:
    """Run `action` in a process of its own: whether it was killed, and the error that it raised."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            sys.setprofile(None)
            os.write(sender, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        problem = file.read().decode()
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), problem
