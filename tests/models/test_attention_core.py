from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from megamoe.models import attention_core
from megamoe.models.attention import AttentionSpan, hide_keys, hide_padding
from megamoe.models.attention_core import DroppedUnits, Hidden, relative_attention
from megamoe.moe.dropout import Dropout, keep_mask
from megamoe.moe.randomness import at_site, draw, token_keys
from tests.oracles.attention import attention_of_matrices

A, W = 3, 4
SITE = "probabilities"
CPU = torch.device("cpu")


@dataclass
class Case:
    """Inputs of the core and what its masks are."""

    segment_len: int
    memory_len: int
    batch: int = 2
    same_length: bool = False
    padded: bool = False
    clamp_len: int = 0
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    query_block: int = 4

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        context_len = self.memory_len + self.segment_len

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        keys = A, self.batch, context_len, W
        r_APW = normal(A, context_len + 1, W)
        if self.clamp_len:
            distances_P = torch.arange(context_len, -1, -1).clamp(max=self.clamp_len)
            r_APW = r_APW[:, context_len - distances_P]
        wide = normal(A, self.batch, self.segment_len, W), normal(*keys), normal(*keys), r_APW
        self.tensors = [x.to(self.dtype).requires_grad_() for x in (*wide, normal(A, W), normal(A, W))]
        self.weighting = normal(A, self.batch, self.segment_len, W).to(self.dtype)
        span = AttentionSpan(max(self.memory_len, 1), self.same_length)
        mask = hide_keys(self.segment_len, context_len, span, CPU)
        if self.padded:
            first_real_B = torch.arange(self.batch) * (context_len - 1)  # of the last row one token is left
            mask = hide_padding(mask, torch.arange(context_len) < first_real_B[:, None])
        self.hidden = Hidden(mask, later_only=not (self.same_length or self.padded))
        self.keys_BS = token_keys(1, 2, range(self.batch), self.segment_len)
        self.heads_A11 = torch.arange(A)[:, None, None]

    def core(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The function that is tested."""
        keys_ABS = at_site(draw(self.keys_BS, self.heads_A11), SITE)
        dropped = DroppedUnits(keys_ABS, self.dropout) if self.dropout else None
        return relative_attention(*tensors, self.hidden, dropped, self.query_block)

    def oracle(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The plain form."""
        return attention_of_matrices(
            *tensors, self.hidden.mask_SC, Dropout(self.dropout, SITE).train(), self.keys_BS
        )

    def gradients(self, context: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Of a weighted sum of the context."""
        return torch.autograd.grad(context, tensors, self.weighting.to(context.dtype))


CASES = {
    "memory": Case(6, 5),
    "no memory": Case(9, 0),
    "memory longer than the segment": Case(3, 11),
    "one query": Case(1, 4),
    "one row": Case(7, 2, batch=1),
    "one query and key": Case(1, 0, batch=1),
    "same length": Case(6, 5, same_length=True),
    "clamp": Case(6, 5, clamp_len=2),
    "padding": Case(6, 5, padded=True),
    "padding in one block of queries": Case(6, 0, padded=True, query_block=128),
    "dropout": Case(6, 5, dropout=0.3),
    "dropout and padding": Case(9, 2, dropout=0.3, padded=True, batch=3),
    "dropout and same length": Case(5, 7, dropout=0.6, same_length=True),
}
ALL = pytest.mark.parametrize("name", CASES)


# One matrix at a time; several rows of one head; several heads; everything.
@pytest.mark.parametrize("scores_at_once", [1, 100, 250, 1 << 19])
@ALL
def test_equals_the_plain_form(name: str, scores_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_core.SCORES_AT_ONCE, "cpu", scores_at_once)
    case = CASES[name]
    context, expected = case.core(*case.tensors), case.oracle(*case.tensors)
    assert_close(context, expected, atol=1e-12, rtol=1e-12)
    gradients, expected_gradients = (case.gradients(x, case.tensors) for x in (context, expected))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(case.core(*case.tensors), context)


@pytest.mark.parametrize("name", ["memory", "same length", "padding", "dropout"])
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    assert torch.autograd.gradcheck(case.core, case.tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_is_as_exact_as_the_type_allows(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    case = Case(150, 100, dropout=dropout, dtype=dtype, query_block=128)
    wide = [x.detach().double().requires_grad_() for x in case.tensors]
    context, exact = case.core(*case.tensors), case.oracle(*wide)
    results = (context, *case.gradients(context, case.tensors))
    for ours, theirs in zip(results, (exact, *case.gradients(exact, wide)), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_drops_the_units_that_dropout_drops() -> None:
    case = Case(6, 5, dropout=0.5)
    saved = saved_by(lambda: case.core(*case.tensors))[-2:]
    keys_ABS = at_site(draw(case.keys_BS, case.heads_A11), SITE).flatten(0, 1)
    visible_SC = ~case.hidden.mask_SC
    for e_GNJ, queries in zip(saved, (slice(0, 4), slice(4, 6)), strict=True):
        n_keys = e_GNJ.shape[-1]
        keep_GNJ = keep_mask(keys_ABS[:, queries], n_keys, 0.5)
        assert torch.equal(e_GNJ > 0, keep_GNJ & visible_SC[queries, :n_keys])


def test_queries_of_padding_give_nothing_and_get_finite_gradients() -> None:
    case = Case(6, 5, padded=True)
    context = case.core(*case.tensors)
    assert context[:, 1, :-1].eq(0).all()
    assert context[:, 1, -1].ne(0).all()
    gradients = case.gradients(context, case.tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][:, 1, :-1].eq(0).all()


def test_keeps_inputs_and_probabilities_in_sight_alone() -> None:
    case = Case(256, 128, dtype=torch.float32, dropout=0.1, query_block=128)
    saved = saved_by(lambda: case.core(*case.tensors))
    n_queries, n_keys, n_matrices = 256 * W, 384 * W, A * 2
    numbers = n_matrices * (2 * n_queries + 2 * n_keys + 128 * 256 + 128 * 384) + A * 385 * W
    assert sum(x.untyped_storage().nbytes() for x in saved) == 4 * numbers


def test_recomputation_changes_no_bit_and_keeps_no_probabilities() -> None:
    case = Case(256, 128, dtype=torch.float32, dropout=0.1, query_block=128)
    plain = case.core(*case.tensors)
    contexts: list[Any] = []
    saved = saved_by(lambda: contexts.append(checkpoint(case.core, *case.tensors, use_reentrant=False)))
    assert all(x.shape[-1] == W for x in saved)
    assert torch.equal(contexts[0], plain)
    for ours, theirs in zip(
        case.gradients(contexts[0], case.tensors), case.gradients(plain, case.tensors), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_only_some_inputs_may_need_gradients() -> None:
    case = CASES["memory"]
    q, *others = case.tensors
    context = case.core(q, *(x.detach() for x in others))
    (expected, *_) = case.gradients(case.oracle(*case.tensors), case.tensors)
    (gradient,) = case.gradients(context, [q])
    assert_close(gradient, expected)


def test_autocast_takes_biases_in_fp32() -> None:
    case = Case(6, 5, dtype=torch.bfloat16)
    *projections, bias_u, bias_v = case.tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = case.core(*projections, bias_u.float(), bias_v.float())
    assert torch.equal(context, case.core(*case.tensors))
    case.gradients(context, case.tensors)


def saved_by(action: Any) -> list[torch.Tensor]:
    """What is kept for the backward pass, each storage once."""
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        action()
    return list(saved.values())
