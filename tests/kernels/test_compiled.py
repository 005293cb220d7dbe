"""The compiled kernels give what torch gives, in values and in gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.testing import assert_close

from megamoe import kernels
from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.moe.dropout import keep_mask
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import draw, token_keys
from megamoe.moe.routing import RouterContext
from tests.models.test_attention_core import Case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _torch_again() -> Iterator[None]:
    yield
    kernels.use(compiled=False)


def both(compute: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """With torch and with the compiled kernels."""
    kernels.use(compiled=False)
    expected = compute()
    kernels.use(compiled=True)
    return expected, compute()


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.isfinite(ours).all()
        scale = theirs.double().norm().clamp(min=1e-3)
        assert (ours.double() - theirs.double()).norm() <= tolerance * scale


@pytest.mark.parametrize("width", [1, 3, 4, 63, 64, 130, 1024])
@pytest.mark.parametrize("p", [0.1, 1e-9, 0.5])
def test_masks_are_the_same_to_the_bit(width: int, p: float) -> None:
    keys = draw(7, torch.arange(300)).view(100, 3)
    expected, found = both(lambda: [keep_mask(keys, width, p), keep_mask(keys.t(), width, p)])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("n_tokens", "top_k"), [(1, 1), (70, 2), (70, 5), (3, 4)])
@TYPES
def test_mixture(dtype: torch.dtype, n_tokens: int, top_k: int, dropout: float, threads: int) -> None:
    moe = MoEConfig(n_experts=5, d_expert=36, top_k=top_k, router=RouterConfig(name="smoe"))
    layer = MoELayer(24, moe, layer=0, seed=1, dropout=dropout, init_std=0.2).to(dtype)
    for bias in (layer.experts.b_in, layer.experts.b_out):
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(4))
    keys_T = token_keys(1, 2, range(1), n_tokens).flatten()
    context = RouterContext(step=0, seed=1, top_k=top_k, token_keys_T=keys_T)
    generator = torch.Generator().manual_seed(3)
    x_BSD, weighting = (torch.randn(1, n_tokens, 24, generator=generator).to(dtype) for _ in range(2))
    leaves = [x_BSD.requires_grad_(), *layer.parameters()]

    def compute() -> list[torch.Tensor]:
        y_BSD, _ = layer(x_BSD, context)
        return [y_BSD, *torch.autograd.grad(y_BSD, leaves, weighting)]

    found_by = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected, found = both(compute)
    finally:
        torch.set_num_threads(found_by)
    assert_near(found, expected, TOLERANCE[dtype])


CASES = {
    "memory": {"segment_len": 6, "memory_len": 5},
    "no memory, one row": {"segment_len": 9, "memory_len": 0, "batch": 1},
    "long rows": {"segment_len": 40, "memory_len": 300, "query_block": 16},
    "dropout": {"segment_len": 33, "memory_len": 17, "dropout": 0.3, "query_block": 16},
    "dropout and same length": {"segment_len": 5, "memory_len": 7, "dropout": 0.6, "same_length": True},
    "dropout and padding": {"segment_len": 9, "memory_len": 2, "dropout": 0.3, "padded": True},
}


@pytest.mark.parametrize("name", CASES)
@TYPES
def test_attention(dtype: torch.dtype, name: str) -> None:
    case = Case(**CASES[name], dtype=dtype)

    def compute() -> list[torch.Tensor]:
        context_ABSW = case.core(*case.tensors)
        with torch.no_grad():
            alone = case.core(*case.tensors)
        assert_close(alone, context_ABSW, atol=0, rtol=0)
        return [context_ABSW, *case.gradients(context_ABSW, case.tensors)]

    expected, found = both(compute)
    assert_near(found, expected, TOLERANCE[dtype])


def test_attention_drops_the_same_probabilities_in_both() -> None:
    """With values of one, a context tells how much of its probabilities was kept."""
    case = Case(64, 0, dropout=0.5, dtype=torch.float32)
    case.tensors[2] = torch.ones_like(case.tensors[2])
    expected, found = both(lambda: [case.core(*case.tensors).detach()])
    assert_near(found, expected, 1e-6)
    assert expected[0].std() > 0.1


def test_double_stays_with_torch() -> None:
    case = Case(6, 5)
    expected, found = both(lambda: [case.core(*case.tensors)])
    assert torch.equal(found[0], expected[0])
    assert kernels.in_use() and not kernels.take(case.tensors[0])
