"""Run a function on several gloo ranks of this machine and collect what each returns."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

TIMEOUT_SECONDS = 240


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """``[function(*args) on rank 0, on rank 1, ...]``, each in its own process with a gloo group.

    `function` must be importable (defined at module level) and return plain picklable values. Ranks
    meet through a file, so parallel test runs never compete for a port. A failing or hanging rank
    ends all of them and fails the caller with that rank's traceback; `timeout` is in seconds.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, str(store), pipes[rank][1], function, args, timeout),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect([receiver for receiver, _ in pipes], processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        assert time.monotonic() < deadline, f"only ranks {sorted(results)} answered in {timeout} s"
        for rank, receiver in enumerate(receivers):
            if rank in results or not receiver.poll(0.05):
                if rank not in results and not processes[rank].is_alive() and not receiver.poll():
                    raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}")
                continue
            ok, value = receiver.recv()
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        sender.send((True, function(*args)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))
