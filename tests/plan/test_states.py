"""Weights, gradients and optimizer states, against partitions drawn by hand."""

from dataclasses import replace

import pytest
import torch

from megamoe.models.parameter_counts import ParameterCounts
from megamoe.parallel.ds_config import Layout
from megamoe.plan.devices import Cluster
from megamoe.plan.estimate import estimate
from megamoe.plan.inventory import Group, Inventory, Share, inventory
from megamoe.plan.memory import states_of
from tests.plan.runs import CPU, small_run

FP32, BF16 = torch.float32, torch.bfloat16


def test_a_group_is_padded_to_whole_partitions() -> None:
    share = Share((10, 3, 8), 4)
    assert (share.held, share.padded, share.partition) == (21, 24, 6)
    # Partitions 0-5, 6-11, 12-17, 18-23 over tensors 0-9, 10-12, 13-20.
    assert [share.touched(place) for place in range(4)] == [10, 13, 11, 8]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_states_of_two_groups_on_four_ranks(stage: int, dtype: torch.dtype) -> None:
    """Experts on two ranks each, or at stage 3 on all."""
    model = Inventory(
        (Group("shared_decay", (100, 20)), Group("experts_decay", (64, 16))), ParameterCounts(200, 7, 80)
    )
    layout = Layout(4, 1 if stage == 3 else 2, 1, 1, stage, dtype)
    found, size = states_of(model, layout), dtype.itemsize
    held, parts = 120 + 40, 30 + 20
    touched = max(100 + 32, 100 + 40, 120 + 40)
    gradients = {0: held, 1: held, 2: touched, 3: 30 + 20}[stage]
    assert found.weights == size * (50 if stage == 3 else held)
    assert found.gradients == size * gradients
    assert found.optimizer == (8 * held if stage == 0 else 12 * parts)
    assert found.frozen == 28


def test_gradients_are_kept_twice_while_micro_batches_accumulate() -> None:
    model = inventory(small_run())
    once = states_of(model, Layout(2, 1, 1, 1, 2, FP32)).gradients
    twice = states_of(model, Layout(2, 1, 1, 4, 2, FP32)).gradients
    assert twice == 2 * once


def test_offloaded_states_are_in_host_memory() -> None:
    model, layout = inventory(small_run()), Layout(2, 2, 1, 1, 1, BF16)
    held, offloaded = states_of(model, layout), states_of(model, layout, offloads=True)
    assert (offloaded.optimizer, offloaded.host) == (0, held.optimizer)


def test_the_sum_has_all_parts_and_the_worst_exchange_is_more() -> None:
    run, cluster = small_run(training={"batch_size": 4}), Cluster(1, 4, CPU)
    memory = estimate(run, Layout(4, 4, 1, 1, 1, FP32), cluster).memory
    parts = ("weights", "gradients", "optimizer", "frozen", "activations", "xl_memory", "exchange", "buckets")
    assert memory.total == sum(getattr(memory, part) for part in parts)
    assert memory.worst > memory.total
    alone = estimate(run, Layout(4, 1, 1, 1, 1, FP32), cluster).memory
    assert alone.exchange == alone.exchange_worst == 0
    assert memory.weights < alone.weights


def test_memory_of_transformer_xl_is_of_all_micro_batches_and_one_more() -> None:
    run, cluster = small_run(training={"batch_size": 8}), Cluster(1, 1, CPU)
    layouts = (Layout(1, 1, 8 // times, times, 1, FP32) for times in (1, 4))
    one, four = (estimate(run, layout, cluster).memory.xl_memory for layout in layouts)
    stream = 3 * 96 * 32 * 4
    assert (one, four) == (2 * 8 * stream, 5 * 2 * stream)


def test_a_bucket_of_the_config_counts() -> None:
    run, layout = small_run(), Layout(1, 1, 3, 1, 1, FP32)
    small, large = (
        estimate(run, layout, Cluster(1, 1, CPU), ds={"zero_optimization": {"reduce_bucket_size": numbers}})
        for numbers in (10**7, 10**8)
    )
    assert large.memory.buckets - small.memory.buckets == 4 * 9 * 10**7
    assert replace(layout, micro_batch_size=3) == layout
