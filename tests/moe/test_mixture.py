"""Every way to compute a mixture gives what the loop over tokens and choices gives, gradients included."""

from typing import Any

import pytest
import torch

from megamoe.moe.dropout import Dropout
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.experts import choose_path
from megamoe.moe.grouped import mix_grouped
from megamoe.moe.mixture import Choices, Weights, _each, mix, mix_fetched
from megamoe.moe.randomness import draw
from tests.oracles import moe as oracle
from tests.oracles import randomness

E, D, F = 4, 16, 24
NOTHING = Dropout(0.0, "nowhere")
WAYS = {"by expert": mix, "grouped": mix_grouped}
TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 0.3, "rtol": 0.03},
}


def stacks(dtype: torch.dtype = torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(1)
    shapes = ((E, F, D), (E, F), (E, D, F), (E, D))
    return Weights(
        *(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    )


def ids(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return {
        "random": torch.randint(-1, E, (70, 3), generator=generator),
        "all experts": torch.arange(E).expand(66, E),
        "one expert": torch.full((9, 1), 2),
        "twice the same": torch.tensor([[1, 1], [3, 0], [0, 0]]),
        "as many choices as tokens, not of all": torch.tensor([[1, 1], [3, 0], [1, 2]]),
        "none": torch.full((5, 2), -1),
        "no tokens": torch.empty(0, 2, dtype=torch.long),
    }[name]


NAMES = (
    "random", "all experts", "one expert", "twice the same", "as many choices as tokens, not of all", "none",
    "no tokens",
)  # fmt: skip


def computed(way: Any, ids_TK: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """y, and the gradients of x, weights and stacks."""
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(len(ids_TK), D, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights_TK = torch.rand(ids_TK.shape, generator=generator, dtype=torch.float64).to(wide)
    if way is None:
        x_TD, weights_TK = x_TD.double(), weights_TK.double()
    leaves = [
        leaf.clone().requires_grad_()
        for leaf in (x_TD, weights_TK, *(s.to(x_TD.dtype) for s in stacks(dtype)))
    ]
    x_TD, weights_TK, *stacked = leaves
    if way is None:
        y_TD = x_TD * 0 + (oracle.mixture(x_TD, ids_TK, weights_TK, *stacked) if len(x_TD) else 0)
    else:
        arrived = LocalExchange().dispatch(x_TD, ids_TK, weights_TK, E, None)
        choices = Choices.of(arrived.token_P, arrived.expert_P, E)
        y_TD = way(x_TD, choices, arrived.weights_P[choices.order_P], Weights(*stacked), NOTHING)
    y_TD.backward(torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD))
    return [y_TD.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts_that_are_fetched_give_the_same_bits(dtype: torch.dtype, name: str) -> None:
    ids_TK, weights, asked = ids(name), stacks(dtype), []
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(len(ids_TK), D, generator=generator, dtype=torch.float64).to(dtype)
    arrived = LocalExchange().dispatch(x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator), E, None)
    choices = Choices.of(arrived.token_P, arrived.expert_P, E)
    weights_P = arrived.weights_P[choices.order_P]
    y_TD = mix_fetched(x_TD, choices, weights_P, lambda expert: asked.append(expert) or weights.of(expert))
    assert torch.equal(y_TD, mix(x_TD, choices, weights_P, weights, NOTHING))
    assert asked == sorted(set(ids_TK[ids_TK >= 0].tolist()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_loop(way: str, dtype: torch.dtype, name: str) -> None:
    if way == "grouped" and dtype == torch.float64:
        dtype = torch.float32  # its products know no wider type
    ours, expected = computed(WAYS[way], ids(name), dtype), computed(None, ids(name), dtype)
    for our, theirs in zip(ours, expected, strict=True):
        assert our.dtype in (dtype, torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(our.double(), theirs, **TOLERANCE[dtype])


def test_gradients_of_weights_keep_fp32_where_rows_have_16_bits() -> None:
    """And weights may differ by less than bf16 can tell."""
    ids_TK = ids("all experts")
    *_, weights_TK = computed(mix, ids_TK, torch.bfloat16)[:3]
    assert weights_TK.dtype == torch.float32
    expected = computed(None, ids_TK, torch.bfloat16)[2]
    error = (weights_TK - expected).norm() / expected.norm()
    assert error < 1e-2  # hidden units and their gradients are rounded to 16 bits, the sums are not
    assert not torch.equal(weights_TK, weights_TK.bfloat16().float())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_token_and_expert_decide_which_units_drop(way: str, dtype: torch.dtype) -> None:
    if way == "grouped" and dtype == torch.float64:
        dtype = torch.float32
    ids_TK, first = ids("random")[:12], 4
    dropout, weights = Dropout(0.3, "layers.2.moe.experts"), stacks(dtype)
    x_TD = torch.randn(12, D, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    arrived = LocalExchange().dispatch(x_TD, ids_TK, torch.ones(ids_TK.shape), E, draw(99, torch.arange(12)))
    choices = Choices.of(arrived.token_P, arrived.expert_P, E)
    keys_P = draw(arrived.keys_N[choices.token_P], choices.expert_P + first)
    choices = Choices(choices.order_P, choices.token_P, choices.expert_P, keys_P, choices.counts_E)
    y_TD = WAYS[way](x_TD, choices, torch.ones(36), weights, dropout)
    y_TD.backward(torch.linspace(-1, 1, y_TD.numel(), dtype=torch.double).view_as(y_TD).to(dtype))
    x_again = x_TD.detach().double().requires_grad_()
    rows = []
    for t, row_D in enumerate(x_again):
        total = torch.zeros(D, dtype=torch.double)
        for e in ids_TK[t].tolist():
            if e < 0:
                continue
            key = randomness.at_site(randomness.splitmix64(int(arrived.keys_N[t]), e + first), dropout.site)
            w_in, b_in, w_out, b_out = (stack[e].double() for stack in weights)
            kept = torch.tensor(randomness.keep(key, F, 0.3))
            total = total + w_out @ ((w_in @ row_D + b_in).relu() * kept / (1 - 19661 / 65536)) + b_out
        rows.append(total)
    expected = torch.stack(rows)
    expected.backward(torch.linspace(-1, 1, y_TD.numel(), dtype=torch.double).view_as(y_TD))
    torch.testing.assert_close(y_TD.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(x_TD.grad.double(), x_again.grad, **TOLERANCE[dtype])


def test_gradients_of_a_mixture_that_drops_are_right_to_the_last_digit() -> None:
    ids_TK = ids("random")[:6]
    choices = Choices.of(
        torch.arange(6).repeat_interleave(3), ids_TK.flatten().where(ids_TK.flatten() >= 0, E), E
    )
    keys_P = draw(7, torch.arange(18))
    choices = Choices(choices.order_P, choices.token_P, choices.expert_P, keys_P, choices.counts_E)
    dropout = Dropout(0.3, "here")
    generator = torch.Generator().manual_seed(5)
    x_ND = torch.randn(6, D, dtype=torch.double, generator=generator).requires_grad_()
    weights_P = torch.rand(18, dtype=torch.double, generator=generator).requires_grad_()
    stacked = [stack.requires_grad_() for stack in stacks()]
    assert torch.autograd.gradcheck(
        lambda x, g, *s: mix(x, choices, g, Weights(*s), dropout), (x_ND, weights_P, *stacked)
    )


def test_what_the_backward_pass_keeps_is_tokens_and_hidden_units() -> None:
    ids_TK = ids("all experts")
    arrived = LocalExchange().dispatch(
        torch.randn(66, D).requires_grad_(), ids_TK, torch.ones(66, E), E, None
    )
    choices = Choices.of(arrived.token_P, arrived.expert_P, E)
    weights = Weights(*(stack.float().requires_grad_() for stack in stacks()))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mix(arrived.x_ND, choices, arrived.weights_P[choices.order_P], weights, NOTHING)
    ours = sum(kept.values()) - sum(stack.nbytes for stack in weights)
    assert ours == 66 * D * 4 + 66 * E * (F + 1) * 4


def test_16_bit_rows_on_a_cpu_come_in_few_sizes() -> None:
    """Each new row count would be compiled; all that reach the products must be multiples of 64."""
    sizes = set()
    for first in range(1, 40):
        experts = torch.tensor([0] * first + [1] * (70 - first) + [3] * 128)
        choices = Choices.of(torch.arange(len(experts)), experts, E)
        x_ND = torch.randn(len(experts), D).bfloat16()
        sizes |= {len(one.take(x_ND)) for one in _each(choices, x_ND)}
    assert sizes == {0, 64, 128}


def test_the_way_follows_from_device_and_type() -> None:
    assert choose_path(torch.zeros(8, D), stacks().w_in) is mix
    assert choose_path(torch.zeros(8, D).bfloat16(), stacks().w_in) is mix
