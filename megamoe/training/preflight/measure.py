"""Measurements that ranks make together: links, collectives, clocks."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megamoe.parallel.launch import World
from megamoe.plan.this_cpu import REPEATS, median_seconds, product_speed

MESSAGE_BYTES = (1 << 16, 1 << 20, 1 << 24)


def collective_speeds(world: World, ep_size: int) -> dict[str, dict[int, float]]:
    """Bytes/s by collective and message size: bytes of one rank's message over the median time.

    All-reduce runs over all ranks, all-to-all among `ep_size` consecutive ranks, as in training.
    """
    group = _consecutive(world, ep_size)
    speeds: dict[str, dict[int, float]] = {"all_reduce": {}, "all_to_all": {}}
    for n_bytes in MESSAGE_BYTES:
        sent = torch.zeros(n_bytes // 4 // ep_size * ep_size, device=world.device)
        received = torch.empty_like(sent)

        def reduce(message: torch.Tensor = sent) -> None:
            dist.all_reduce(message)

        def exchange(message: torch.Tensor = sent, into: torch.Tensor = received) -> None:
            dist.all_to_all_single(into, message, group=group)

        if world.world_size > 1:
            speeds["all_reduce"][n_bytes] = n_bytes / _seconds(world, reduce)
        if ep_size > 1:
            speeds["all_to_all"][n_bytes] = n_bytes / _seconds(world, exchange)
    return speeds


def best_link(world: World, hosts: list[str], n_bytes: int = 1 << 22) -> float:
    """Bytes/s of this rank's fastest pair, with ranks on other hosts where there are several; else 0.

    Ranks pair with rank XOR 1, 2, 4, ..., all pairs of a round at once.
    """
    sent = torch.zeros(n_bytes // 4, device=world.device)
    received = torch.empty_like(sent)
    best, distance = 0.0, 1
    while distance < world.world_size:
        other = world.rank ^ distance
        world.barrier()
        if other < world.world_size and (len(set(hosts)) == 1 or hosts[other] != hosts[world.rank]):

            def swap(other: int = other) -> None:
                ops = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
                for work in dist.batch_isend_irecv(ops):
                    work.wait()

            best = max(best, n_bytes / _seconds(world, swap))
        distance *= 2
    return best


def arithmetic_speed(world: World, dtype: torch.dtype) -> float:
    """Operations/s of a product of square matrices; all ranks at once, as they train."""
    world.barrier()
    return product_speed(world.device, dtype)


def clock_ahead(world: World) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's: Cristian's method, shortest round trip."""
    ahead = 0.0
    for rank in range(1, world.world_size):
        if world.rank == 0:
            for _ in range(REPEATS):
                dist.recv(_stamp(world), rank)
                dist.send(_stamp(world), rank)
        elif world.rank == rank:
            ahead = min(_round_trip(world) for _ in range(REPEATS))[1]
    return ahead


def _round_trip(world: World) -> tuple[float, float]:
    began, answer = time.time(), _stamp(world)
    dist.send(_stamp(world), 0)
    dist.recv(answer, 0)
    theirs = float(answer)
    ended = time.time()
    return ended - began, (began + ended) / 2 - theirs


def _stamp(world: World) -> torch.Tensor:
    return torch.tensor(time.time(), dtype=torch.float64, device=world.device)


def _consecutive(world: World, size: int) -> dist.ProcessGroup | None:
    mine = None
    for first in range(0, world.world_size, size):
        group = dist.new_group(list(range(first, first + size)))
        if first <= world.rank < first + size:
            mine = group
    return mine


def _seconds(world: World, action: Callable[[], None]) -> float:
    return median_seconds(world.device, action)  # the first call, left out there, connects
