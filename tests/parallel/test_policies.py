"""Every routing policy on 2 and 4 ranks gives the numbers of plain torch in one process."""

from typing import Any

import pytest

from tests.parallel.parity import policy_parity, policy_runs
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
N_PARTS = 4


@pytest.mark.parametrize("part", range(N_PARTS))
@pytest.mark.parametrize(
    ("world_size", "ep_size", "stages"),
    [(2, 2, (1, 2)), (4, 4, (2, 1)), (2, 1, (3,))],
    ids=["world2-ep2", "world4-ep4", "world2-zero3"],
)
def test_every_policy_equals_plain_torch_in_one_process(
    world_size: int, ep_size: int, stages: tuple[int, ...], part: int
) -> None:
    """Loss, auxiliary losses, gradients, their norm, weights and buffers."""
    ranks: list[dict[str, Any]] = run_ranks(policy_parity, world_size, ep_size, stages, part, N_PARTS)
    assert list(ranks[0]) == list(policy_runs())[part::N_PARTS]
    off = {
        (rank, policy): found
        for rank, deviations in enumerate(ranks)
        for policy, found in deviations.items()
        if not all(deviation < (1e-4 if what == "gradient" else 2e-5) for what, deviation in found.items())
    }
    assert not off
