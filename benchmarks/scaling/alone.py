"""One rank of a world whose other ranks do not exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamoe.parallel.launch import Launch, World, start


@contextmanager
def one_rank_of(world_size: int) -> Iterator[World]:
    """Rank 0 of `world_size`; collectives return at once, as if all ranks gave what this one gives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    with patch.dict(os.environ):  # where `start` describes the launch to DeepSpeed
        world = start(Launch(world_size=world_size))
        try:
            with patch.object(dist, "all_to_all_single", _echo):
                yield world
        finally:
            world.shutdown()


def _echo(received: torch.Tensor, rows: torch.Tensor, *splits: Any, **group: Any) -> None:
    """Each rank sends what is sent to it, so that all parts fit; torch's own form copies part by part."""
    received.copy_(rows)
