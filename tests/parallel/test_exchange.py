"""Rows sent to other ranks and back give what the exchange within one process gives."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megamoe.moe.exchange import Dispatched, Exchange, LocalExchange
from megamoe.parallel.exchange import AllToAllExchange
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
E, D, K = 4, 3, 2


def choices(name: str, rank: int) -> torch.Tensor:
    """expert_ids_TK [T, K] of a rank; the ranks' T differ."""
    generator = torch.Generator().manual_seed(rank)
    random = torch.randint(0, E, (5 + rank, K), generator=generator)
    return {
        "random": random,
        "some without expert": random.where(random != 2, -1),
        "one expert for all": torch.zeros_like(random),
        "rank 1 sends nothing": random if rank == 0 else torch.full_like(random, -1),
        "rank 0 has no tokens": random[: 0 if rank == 0 else None],
        "nobody sends": torch.full_like(random, -1),
    }[name]


NAMES = (
    "random", "some without expert", "one expert for all", "rank 1 sends nothing", "rank 0 has no tokens",
    "nobody sends",
)  # fmt: skip


def mixture(
    exchange: Exchange,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_EDD: torch.Tensor,
) -> torch.Tensor:
    """A layer whose expert e multiplies by w_EDD[e], and by a number that each token sends along."""
    dispatched: Dispatched = exchange.dispatch(x_TD, ids_TK, E)
    chunks = dispatched.rows_ND.split(dispatched.counts)
    rows_ND = torch.cat([rows @ w for rows, w in zip(chunks, w_EDD.unbind(), strict=True)])
    numbers_T = torch.arange(len(x_TD)) * 3 + 1
    rows_ND = rows_ND * exchange.send_along(numbers_T, dispatched)[:, None] / 22
    return dispatched.choices.weighted_sum(exchange.bring_home(rows_ND, dispatched), weights_TK)


def outputs_and_gradients(
    layer: Callable[..., torch.Tensor], exchange: Exchange, ids_TK: torch.Tensor, w_EDD: torch.Tensor
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x_TD = torch.randn(len(ids_TK), D, generator=generator).requires_grad_()
    weights_TK = torch.rand(ids_TK.shape, generator=generator).requires_grad_()
    w_EDD = w_EDD.clone().requires_grad_()
    y_TD = layer(exchange, x_TD, ids_TK, weights_TK, w_EDD)
    (y_TD * torch.arange(1.0, D + 1)).sum().backward()
    return [y_TD.detach(), x_TD.grad, weights_TK.grad, w_EDD.grad]


def recomputed(exchange: Exchange, *tensors: torch.Tensor) -> torch.Tensor:
    return checkpoint(mixture, exchange, *tensors, use_reentrant=False)


def compare() -> dict[str, Any]:
    """Largest differences by case, and the traffic of one case."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    exchange = AllToAllExchange(dist.group.WORLD)
    w_EDD = torch.randn(E, D, D, generator=torch.Generator().manual_seed(3))
    n_local = E // n_ranks
    mine = slice(rank * n_local, (rank + 1) * n_local)
    result = {}
    for layer in (mixture, recomputed):
        for name in NAMES:
            ids_TK = choices(name, rank)
            *expected, w_grad = outputs_and_gradients(mixture, LocalExchange(), ids_TK, w_EDD)
            dist.all_reduce(w_grad)
            actual = outputs_and_gradients(layer, exchange, ids_TK, w_EDD[mine])
            differences = [a - b for a, b in zip(actual, [*expected, w_grad[mine]], strict=True)]
            result[f"{layer.__name__}: {name}"] = max(float(d.abs().max()) for d in differences if d.numel())
    return {"differences": result, "traffic": traffic(exchange, w_EDD[mine])}


def traffic(exchange: AllToAllExchange, w_EDD: torch.Tensor) -> dict[str, Any]:
    """Elements this rank sends in every all-to-all of one forward and backward pass."""
    sent: list[tuple[str, int]] = []
    original = dist.all_to_all_single

    def recording(received: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((str(rows.dtype), rows.numel()))
        return original(received, rows, *args, **kwargs)

    ids_TK = choices("some without expert", dist.get_rank())
    with mock.patch.object(dist, "all_to_all_single", recording):
        outputs_and_gradients(mixture, exchange, ids_TK, w_EDD)
    counts = torch.bincount(ids_TK[ids_TK >= 0], minlength=E)
    received = counts.clone()
    dist.all_reduce(received)
    mine = received.view(exchange.n_ranks, -1)[dist.get_rank()]
    return {"sent": sent, "rows_from_home": int(counts.sum()), "rows_from_experts": int(mine.sum())}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(compare, request.param)


@pytest.mark.parametrize("layer", ["mixture", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_local_exchange(ranks: list[dict[str, Any]], layer: str, name: str) -> None:
    for rank in ranks:
        assert rank["differences"][f"{layer}: {name}"] < 1e-5


def test_traffic_is_what_the_counts_say(ranks: list[dict[str, Any]]) -> None:
    """Counts once; rows there, the number of each, and back; the gradients. No padding, nothing twice."""
    for rank in ranks:
        traffic = rank["traffic"]
        home, away = traffic["rows_from_home"] * D, traffic["rows_from_experts"] * D
        rows, numbers = "torch.float32", "torch.int64"
        assert traffic["sent"] == [
            (numbers, E), (rows, home), (numbers, home // D), (rows, away), (rows, home), (rows, away),
        ]  # fmt: skip
