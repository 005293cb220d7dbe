"""Attention by blocks of queries is that of all at once in plain torch, gradients included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megamoe.models import attention_core
from megamoe.models.attention import AttentionSpan, hide_keys, hide_padding
from megamoe.models.attention_core import Heads, Visible, attend
from megamoe.moe.dropout import Dropout, keep_mask, rescale
from megamoe.moe.randomness import at_site, draw

A, B, S, C, W = 2, 3, 9, 14, 5
TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 6e-2, "rtol": 6e-2},
}
NOTHING, SOME = Dropout(0.0, "here"), Dropout(0.4, "here")


@pytest.fixture(autouse=True, params=[4, 128], ids=["blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_core, "QUERY_BLOCK", request.param)
    yield


def heads_of(dtype: torch.dtype) -> Heads:
    generator = torch.Generator().manual_seed(1)
    shapes = ((A, B, S, W), (A, B, C, W), (A, B, C, W), (A, C + 1, W), (A, W), (A, W))
    return Heads(*(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes))


def visible_of(name: str) -> Visible:
    cpu = torch.device("cpu")
    causal_SC = hide_keys(S, C, AttentionSpan(C - S), cpu)
    keys_BS = draw(3, torch.arange(B * S)).view(B, S)
    padding_BC = torch.arange(C) < torch.tensor([[0], [2], [8]])  # the last row has queries of padding too
    return {
        "causal": Visible(causal_SC, True, NOTHING, None),
        "causal, hidden one by one": Visible(causal_SC, False, NOTHING, None),
        "same length": Visible(hide_keys(S, C, AttentionSpan(3, True), cpu), False, NOTHING, None),
        "padding": Visible(hide_padding(causal_SC, padding_BC), False, NOTHING, None),
        "dropout": Visible(causal_SC, True, SOME, keys_BS),
        "padding and dropout": Visible(hide_padding(causal_SC, padding_BC), False, SOME, keys_BS),
    }[name]


NAMES = ("causal", "causal, hidden one by one", "same length", "padding", "dropout", "padding and dropout")


def plain(heads: Heads, visible: Visible) -> torch.Tensor:
    """The equations, all queries at once; the distance of each pair is looked up."""
    scale = W**-0.5
    contents = (heads.queries + heads.bias_u[:, None, None]) * scale
    places = (heads.queries + heads.bias_v[:, None, None]) * scale
    row_SC = C - (torch.arange(C - S, C)[:, None] - torch.arange(C)).clamp(min=0)
    looked_up_ASCW = heads.distances[:, row_SC]
    scores = contents @ heads.keys.mT + torch.einsum("absw,ascw->absc", places, looked_up_ASCW)
    hidden = visible.hidden_SC.expand(B, S, C)
    probabilities = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0)
    if visible.keys_BS is not None:
        keys_ABS = at_site(draw(visible.keys_BS, torch.arange(A)[:, None, None]), visible.dropout.site)
        probabilities = probabilities * keep_mask(keys_ABS, C, 0.4) * rescale(0.4)
    return probabilities @ heads.values


def computed(way: Any, dtype: torch.dtype, visible: Visible) -> list[torch.Tensor]:
    heads = heads_of(dtype)
    if way is plain:
        heads = Heads(*(leaf.detach().double().requires_grad_() for leaf in heads))
    contexts = way(heads, visible)
    contexts.backward(torch.linspace(-1, 1, contexts.numel(), dtype=contexts.dtype).view_as(contexts))
    return [contexts.detach(), *(leaf.grad for leaf in heads)]  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_equations(dtype: torch.dtype, name: str) -> None:
    visible = visible_of(name)
    for ours, theirs in zip(computed(attend, dtype, visible), computed(plain, dtype, visible), strict=True):
        assert ours.dtype == dtype
        if dtype == torch.bfloat16:  # sums of many rounded numbers: judged as a whole
            assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
        else:
            torch.testing.assert_close(ours.double(), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_to_the_last_digit(name: str) -> None:
    visible = visible_of(name)
    assert torch.autograd.gradcheck(lambda *heads: attend(Heads(*heads), visible), [*heads_of(torch.float64)])


def test_kept_are_the_heads_the_probabilities_and_a_byte_for_each_that_may_drop() -> None:
    heads, sizes = heads_of(torch.float32), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(heads, visible_of("dropout"))
    n_scores = sum(
        min(attention_core.QUERY_BLOCK, S - start) * (C - S + min(start + attention_core.QUERY_BLOCK, S))
        for start in range(0, S, attention_core.QUERY_BLOCK)
    )
    assert sum(sizes.values()) == sum(leaf.nbytes for leaf in heads) + A * B * n_scores * (4 + 1)


def test_nothing_is_kept_in_evaluation() -> None:
    with torch.no_grad():
        assert attend(heads_of(torch.float32), visible_of("causal")).grad_fn is None


def test_autocast_computes_in_its_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(attend, torch.float32, visible_of("causal"))
    assert found[0].dtype == torch.bfloat16
    for ours, theirs in zip(found, computed(plain, torch.float32, visible_of("causal")), strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
