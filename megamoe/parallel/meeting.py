"""How the processes of a launch find each other, and a roll call that names what would keep them apart."""

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from megamoe.errors import DistributedError
from megamoe.parallel.network import advertised_address, is_loopback, outward_interface, require_interfaces

if TYPE_CHECKING:
    from megamoe.parallel.launch import Launch

# Nodes of a large job come one after the other when all import from one file server.
PATIENCE = timedelta(minutes=10)
REMINDER = timedelta(seconds=30)
FAREWELL = timedelta(seconds=5)


@dataclass(frozen=True)
class Present:
    """What a rank says of itself at the roll call.

    Attributes:
        node: tells machines apart, also those that have one name.
        host: the machine's name.
        local_rank: as launched.
        address: the loopback address at which gloo would let others look for this rank; empty if it is
            another one.
    """

    node: str
    host: str
    local_rank: int
    address: str


def join(launch: "Launch", backend: str, timeout: timedelta) -> None:
    """Start the process group of a launch once all of its ranks are there.

    Args:
        launch: who this process is.
        backend: "nccl" or "gloo".
        timeout: of later collectives; the ranks must be there within it, and within ten minutes.

    Raises:
        DistributedError: ranks did not come, came twice, or could not reach each other; all are told.
    """
    if launch.world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    require_interfaces(os.environ, backend)
    patience = min(timeout, PATIENCE)
    try:
        store = _store(launch, patience)
        problem = _call_roll(launch, backend, store, patience)
        if problem:
            raise DistributedError(problem)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"{_place(launch)}: {launch.world_size} processes could not meet there"
            f" ({str(error).splitlines()[0]}){_loopback_hint(launch)}"
        ) from error


def _place(launch: "Launch") -> str:
    host, port = launch.address
    return f"MASTER_ADDR = {host}, MASTER_PORT = {port}"


def _loopback_hint(launch: "Launch") -> str:
    if launch.local_size < launch.world_size and is_loopback(launch.address[0]):
        return "; that address is each node itself: export the host of rank 0"
    return ""


def _store(launch: "Launch", patience: timedelta) -> Store:
    """Where ranks leave word for each other. torchrun keeps one for its ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(rendezvous("env://", timeout=patience))[0]
    return TCPStore(
        *launch.address, launch.world_size, is_master=launch.rank == 0, timeout=patience,
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def _call_roll(launch: "Launch", backend: str, store: Store, patience: timedelta) -> str:
    """What keeps these ranks from working together, as rank 0 finds it; empty if nothing does."""
    prefix = f"megamoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    keys = [f"{prefix}/{rank}" for rank in range(launch.world_size)]
    # Two jobs at one port would mix their ranks and wait for each other for ever.
    if store.add(f"{keys[launch.rank]}/times", 1) > 1:
        return (
            f"{_place(launch)}: another job is using this port, its rank {launch.rank} was here first; choose"
            " another one (--master_port)"
        )
    store.set(keys[launch.rank], json.dumps(asdict(_myself(launch, backend))))
    if launch.rank != 0:
        # Rank 0 may have started later, and then waits its whole patience for others.
        store.wait([f"{prefix}/verdict"], 2 * patience)
        verdict = store.get(f"{prefix}/verdict").decode()
        store.set(f"{keys[launch.rank]}/told", "")
        return verdict
    missing = _wait_for_all(launch, store, keys, patience)
    if missing:
        verdict = (
            f"{_place(launch)}: {_ranks(missing)} of {launch.world_size} did not come within"
            f" {patience.total_seconds():.0f} s; see whether {'they' if missing[1:] else 'it'} started, or"
            " unset RANK and WORLD_SIZE if this is to be one process"
        )
    else:
        verdict = find_problem([Present(**json.loads(store.get(key))) for key in keys])
    store.set(f"{prefix}/verdict", verdict)
    if verdict:
        # The store ends with this process.
        with suppress(dist.DistStoreError):
            there = [key for rank, key in enumerate(keys) if rank and rank not in missing]
            store.wait([f"{key}/told" for key in there], FAREWELL)
    return verdict


def _myself(launch: "Launch", backend: str) -> Present:
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname()
    address = advertised_address() if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ else ""
    return Present(
        node=f"{host} {boot.read_text().strip() if boot.exists() else ''}",
        host=host,
        local_rank=launch.local_rank,
        address=address if is_loopback(address) else "",
    )


def _wait_for_all(launch: "Launch", store: Store, keys: Sequence[str], patience: timedelta) -> list[int]:
    """The ranks that are missing when patience ends; says now and then whom it is waiting for."""
    end = time.monotonic() + patience.total_seconds()
    while True:
        left = timedelta(seconds=max(0.01, end - time.monotonic()))
        try:
            store.wait(list(keys), min(left, REMINDER))
            return []
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not missing or time.monotonic() >= end:
            return missing
        logging.getLogger("megamoe").warning(
            "%s: waiting for %s of %d", _place(launch), _ranks(missing), launch.world_size
        )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def find_problem(present: Sequence[Present]) -> str:
    """The one line that says why these ranks, in order, cannot work together; empty if they can."""
    taken: dict[tuple[str, int], int] = {}
    for rank, who in enumerate(present):
        first = taken.setdefault((who.node, who.local_rank), rank)
        if first != rank:
            return (
                f"LOCAL_RANK = {who.local_rank}: ranks {first} and {rank} on {who.host} both have it; number"
                " the ranks of each node from 0"
            )
    hidden = {who.host: who.address for who in present if who.address}
    if hidden and len({who.node for who in present}) > 1:
        host, address = next(iter(hidden.items()))
        others = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
        interface = outward_interface() or "INTERFACE"
        return (
            f"{host}{others}: its own name resolves to {address}, so other nodes would look for it on"
            f" themselves; export GLOO_SOCKET_IFNAME={interface}, or mend its /etc/hosts"
        )
    return ""
