"""Rows sent to other ranks and back give what the exchange within one process gives."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megamoe.moe.exchange import Arrived, Exchange, LocalExchange
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


def arrive(exchange: Exchange, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: Any) -> Arrived:
    return exchange.dispatch(x_TD, ids_TK, weights_TK, E, torch.arange(len(x_TD)) * 3 + 1)


def rows_of(arrived: Arrived, w_EDD: torch.Tensor) -> torch.Tensor:
    """A layer whose expert e multiplies by w_EDD[e], and by a number that each token brings along."""
    none_DD = torch.zeros_like(w_EDD[:1])
    w_PDD = torch.cat([w_EDD, none_DD])[arrived.expert_P]
    rows_PD = torch.einsum("pd,pde->pe", arrived.x_ND[arrived.token_P], w_PDD)
    assert arrived.keys_N is not None
    return rows_PD * arrived.keys_N[arrived.token_P, None] / 22


def mixture(
    exchange: Exchange,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_EDD: torch.Tensor,
) -> torch.Tensor:
    """Weighted sums of the experts' rows."""
    arrived = arrive(exchange, x_TD, ids_TK, weights_TK)
    assert arrived.weights_P is not None
    rows_PD = rows_of(arrived, w_EDD) * arrived.weights_P[:, None]
    y_ND = torch.zeros_like(arrived.x_ND).index_add(0, arrived.token_P, rows_PD)
    return exchange.bring_home(y_ND, arrived)


def each_choice(
    exchange: Exchange,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_EDD: torch.Tensor,
) -> torch.Tensor:
    """The same from each choice's row, weighted at home."""
    arrived = arrive(exchange, x_TD, ids_TK, None)
    rows_TKD = exchange.bring_choices_home(rows_of(arrived, w_EDD), arrived)
    return (rows_TKD * weights_TK[..., None]).sum(1)


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
    for layer in (mixture, each_choice, recomputed):
        for name in NAMES:
            ids_TK = choices(name, rank)
            *expected, w_grad = outputs_and_gradients(mixture, LocalExchange(), ids_TK, w_EDD)
            dist.all_reduce(w_grad)
            actual = outputs_and_gradients(layer, exchange, ids_TK, w_EDD[mine])
            differences = [a - b for a, b in zip(actual, [*expected, w_grad[mine]], strict=True)]
            result[f"{layer.__name__}: {name}"] = max(float(d.abs().max()) for d in differences if d.numel())
    return {"differences": result, "traffic": traffic(exchange, w_EDD[mine])}


def traffic(exchange: AllToAllExchange, w_EDD: torch.Tensor) -> dict[str, Any]:
    """What this rank sends in every all-to-all of one forward and backward pass, and how often it must."""
    sent: list[tuple[str, int]] = []
    original = dist.all_to_all_single

    def recording(received: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append((str(rows.dtype), rows.nbytes))
        return original(received, rows, *args, **kwargs)

    ids_TK = choices("some without expert", dist.get_rank())
    with mock.patch.object(dist, "all_to_all_single", recording):
        outputs_and_gradients(mixture, exchange, ids_TK, w_EDD)
    n_ranks, n_local = exchange.n_ranks, E // exchange.n_ranks
    counts_R2 = torch.tensor(
        [
            [len({t for t, _ in pairs}), len(pairs)]
            for r in range(n_ranks)
            for pairs in [[(t, e) for t, row in enumerate(ids_TK.tolist()) for e in row if e // n_local == r]]
        ]
    )
    everyone = [torch.empty_like(counts_R2) for _ in range(n_ranks)]
    dist.all_gather(everyone, counts_R2)
    arrived_2 = torch.stack([counts_R2[dist.get_rank()] for counts_R2 in everyone]).sum(0)
    return {"sent": sent, "from_home": counts_R2.sum(0).tolist(), "from_experts": arrived_2.tolist()}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(compare, request.param)


@pytest.mark.parametrize("layer", ["mixture", "each_choice", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_local_exchange(ranks: list[dict[str, Any]], layer: str, name: str) -> None:
    for rank in ranks:
        assert rank["differences"][f"{layer}: {name}"] < 1e-5


def test_nothing_is_sent_twice(ranks: list[dict[str, Any]]) -> None:
    """Numbers once; a token once to each rank of its experts, with weight and code of each choice and its
    key; one sum back from each rank; the same again for gradients. No padding, nothing twice."""
    n_ranks = len(ranks)
    for rank in ranks:
        copies, choices = rank["traffic"]["from_home"]
        copies_here, choices_here = rank["traffic"]["from_experts"]
        rows, numbers = "torch.float32", "torch.int64"
        forward = [
            (numbers, 8 * 2 * n_ranks), (rows, 4 * D * copies), (numbers, 8 * choices), (rows, 4 * choices),
            (numbers, 8 * copies), (rows, 4 * D * copies_here),
        ]  # fmt: skip
        backward = [(rows, 4 * D * copies), (rows, 4 * choices_here), (rows, 4 * D * copies_here)]
        assert rank["traffic"]["sent"][:6] == forward
        assert sorted(rank["traffic"]["sent"][6:]) == sorted(backward)
