"""Losses without all logits at once are those with them, gradients included."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megamoe.models import cross_entropy as module

T, D, V = 37, 6, 11
TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-6, "rtol": 1e-5},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
}


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((T, D), (V, D), (V,))]


def computed(dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, and the gradients of hidden states, weight and bias."""
    leaves = [leaf.requires_grad_() for leaf in inputs(dtype)]
    loss_T = module.linear_cross_entropy(*leaves, torch.arange(T) % V)
    (loss_T * torch.linspace(-1, 2, T)).sum().backward()
    return [loss_T.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("at_once", [1, V, 5 * V + 3, T * V - 1])
def test_parts_change_nothing(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    hidden_TD, weight_VD, bias_V = (leaf.double().requires_grad_() for leaf in inputs(dtype))
    expected = cross_entropy(hidden_TD @ weight_VD.t() + bias_V, torch.arange(T) % V, reduction="none")
    (expected * torch.linspace(-1, 2, T)).sum().backward()
    found = computed(dtype)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    for ours, theirs in zip(found, (expected, hidden_TD.grad, weight_VD.grad, bias_V.grad), strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs.detach(), **TOLERANCE[dtype])


def test_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", V)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.linear_cross_entropy(
            *(leaf.requires_grad_() for leaf in inputs(torch.float32)), torch.arange(T) % V
        )
    assert sum(tensor.numel() for tensor in kept.values()) == T * D + V * D + V + 2 * T


def test_autocast_rounds_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_once in (T * V, V):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(computed(torch.float32))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=2e-2, rtol=2e-2)
        assert parts.dtype == torch.float32
