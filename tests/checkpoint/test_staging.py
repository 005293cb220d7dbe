"""Copies that are made while training goes on hold what was there when the save began."""

import torch

from megamoe.checkpoint.shard import Slice
from megamoe.checkpoint.staging import Staging


def test_a_buffer_that_changes_before_the_copy_is_saved_as_it_was() -> None:
    weight, buffer = torch.arange(4.0), torch.arange(3)
    staging = Staging()
    held = staging.hold([Slice("weight", "w", (4,), 0, weight), Slice("buffer", "b", (3,), 0, buffer)])
    buffer += 1
    assert held[0].values is weight
    assert [part.values.tolist() for part in staging.copy(held)] == [[0, 1, 2, 3], [0, 1, 2]]


def test_host_memory_serves_every_save_of_the_same_parts() -> None:
    weight = torch.arange(4.0)
    staging = Staging()
    (first,) = staging.copy([Slice("weight", "w", (4,), 0, weight)])
    (second,) = staging.copy([Slice("weight", "w", (4,), 0, weight + 1)])
    assert second.values.data_ptr() == first.values.data_ptr() != weight.data_ptr()
    assert second.values.tolist() == [1, 2, 3, 4]
    (longer,) = staging.copy([Slice("weight", "w", (4,), 1, weight[1:])])
    assert longer.values.tolist() == [1, 2, 3]
