import pytest
import torch

from megamoe.moe import experts as paths
from megamoe.moe.experts import Experts, Weights
from megamoe.moe.randomness import draw
from tests.oracles import moe as oracle
from tests.oracles import randomness

SIZES = {"n_experts": 4, "d_model": 16, "d_expert": 24}


def build(local=range(4), dropout=0.0, dtype=torch.float32, **changes):
    sizes = SIZES | changes
    experts = Experts(**sizes, dropout=dropout, init_std=0.3, seed=7, layer=2, local=local)
    torch.nn.init.normal_(experts.b_in, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(experts.b_out, generator=torch.Generator().manual_seed(2))
    return experts.to(dtype)


def keep_all(hidden, _first):
    return hidden


def compute(path, rows_ND, counts, stacks):
    """Output, and gradients of rows and stacks for a fixed upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (rows_ND, *stacks)]
    y_ND = path(leaves[0], counts, Weights(*leaves[1:]), keep_all)
    y_ND.backward(torch.linspace(-1, 1, y_ND.numel(), dtype=y_ND.dtype).view_as(y_ND))
    return [y_ND.detach(), *(leaf.grad for leaf in leaves)]


def expected(rows_ND, counts, stacks):
    ids_N1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]

    def path(rows, _counts, weights, _drop):
        return oracle.mixture(rows, ids_N1, torch.ones(ids_N1.shape, dtype=rows.dtype), *weights)

    return compute(path, rows_ND.double(), counts, [stack.double() for stack in stacks])


COUNTS = [[5, 5, 5, 5], [0, 9, 1, 4], [12, 0, 0, 0], [0, 0, 0, 1], [64, 1, 63, 65]]
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.3, "rtol": 0.03}}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", ["one_by_one", "batched", "grouped"])
def test_every_path_equals_the_loop_over_rows(name, counts, dtype):
    if name == "batched" and len(set(counts)) > 1:
        counts = [counts[0] + 1] * 4
    if name == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    stacks = [stack.detach().to(dtype) for stack in build().parameters()]
    rows_ND = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours = compute(getattr(paths, name), rows_ND, counts, stacks)
    for ours_tensor, expected_tensor in zip(ours, expected(rows_ND, counts, stacks), strict=True):
        torch.testing.assert_close(ours_tensor.double(), expected_tensor, **TOLERANCE[dtype])


def test_the_path_follows_from_shape_and_type():
    w_in = build().w_in
    rows_ND = torch.zeros(8, 16)
    assert paths.choose_path(rows_ND, [2, 2, 2, 2], w_in) is paths.one_by_one
    assert paths.choose_path(rows_ND.bfloat16(), [2, 2, 2, 2], w_in) is paths.batched
    assert paths.choose_path(rows_ND.bfloat16(), [1, 3, 2, 2], w_in) is paths.one_by_one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0, 0, 0]])
def test_experts_without_rows_have_a_gradient_of_zero(counts, dtype):
    experts = build(dtype=dtype)
    experts(torch.randn(sum(counts), 16, dtype=dtype), counts).sum().backward()
    for parameter in experts.parameters():
        idle = [e for e, count in enumerate(counts) if not count]
        assert torch.count_nonzero(parameter.grad[idle]) == 0


def test_16_bit_rows_on_a_cpu_come_in_few_sizes():
    """Each new row count would be compiled; all that reach the products must be multiples of 64."""
    sizes = set()

    def watch(hidden, _first):
        sizes.add(len(hidden))
        return hidden

    stacks = Weights(*(stack.detach().bfloat16() for stack in build().parameters()))
    for first in range(1, 40):
        counts = [first, 70 - first, 0, 128]
        paths.one_by_one(torch.zeros(sum(counts), 16).bfloat16(), counts, stacks, watch)
    assert sizes == {0, 64, 128}


def test_an_expert_is_the_same_whoever_holds_it():
    whole = Experts(**SIZES, dropout=0.0, init_std=0.3, seed=7, layer=2, local=range(4))
    part = Experts(**SIZES, dropout=0.0, init_std=0.3, seed=7, layer=2, local=range(2, 4))
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name][2:])


def test_experts_layers_and_seeds_start_differently():
    draws = [
        Experts(**SIZES, dropout=0.0, init_std=0.3, seed=seed, layer=layer, local=range(4)).w_in[expert]
        for seed, layer, expert in [(7, 2, 0), (7, 2, 1), (7, 3, 0), (8, 2, 0)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_initial_values():
    experts = Experts(8, 64, 128, dropout=0.0, init_std=0.05, seed=1, layer=0, local=range(8))
    assert experts.w_in.std().item() == pytest.approx(0.05, rel=0.02)
    assert experts.w_out.std().item() == pytest.approx(0.05, rel=0.02)
    assert torch.count_nonzero(experts.b_in) == torch.count_nonzero(experts.b_out) == 0
    assert experts.w_in.shape == (8, 128, 64)
    assert experts.w_out.shape == (8, 64, 128)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("one_by_one", [0, 20, 2, 10]), ("one_by_one", [8, 8, 8, 8]), ("one_by_one", [0, 0, 3, 64]),
        ("batched", [8, 8, 8, 8]), ("grouped", [0, 20, 2, 10]), ("grouped", [0, 0, 0, 3]),
    ],
)  # fmt: skip
def test_every_path_drops_the_units_that_token_and_expert_decide(name, counts, dtype, monkeypatch):
    if name == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(paths, "choose_path", lambda *_: getattr(paths, name))
    experts = build(n_experts=8, local=range(4, 8), dropout=0.3, dtype=dtype)
    rows_ND = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    keys_N = draw(99, torch.arange(sum(counts)))
    owners = [4 + e for e, count in enumerate(counts) for _ in range(count)]
    expected = []
    for row_D, key, expert in zip(rows_ND.double(), keys_N.tolist(), owners, strict=True):
        key = randomness.at_site(randomness.splitmix64(key, expert), "layers.2.moe.experts")
        w_in, b_in, w_out, b_out = (stack[expert - 4].double() for stack in experts.parameters())
        kept = torch.tensor(randomness.keep(key, 24, 0.3))
        expected.append(w_out @ ((w_in @ row_D + b_in).relu() * kept / (1 - 19661 / 65536)) + b_out)
    y_ND = experts(rows_ND, counts, keys_N)
    torch.testing.assert_close(y_ND.double(), torch.stack(expected), **TOLERANCE[dtype])
    plain = build(n_experts=8, local=range(4, 8), dtype=dtype)(rows_ND, counts)
    assert torch.equal(experts.eval()(rows_ND, counts), plain)
