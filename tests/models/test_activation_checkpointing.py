from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megamoe.models.transformer_xl import TransformerXL
from tests.models.builders import VOCABULARY, small_model

IDS = torch.randint(VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
LAYERS = pytest.mark.parametrize("moe_layers", ["all", "0", "none"])


def model_for(moe_layers: str, recompute: bool) -> TransformerXL:
    model = small_model(moe_layers=moe_layers, dropout=0.2, attention_dropout=0.2)
    model.set_activation_checkpointing(recompute)
    return model


def loss_and_saved_bytes(model: TransformerXL) -> tuple[torch.Tensor, int]:
    """The loss of a second segment, and how many bytes its graph keeps besides the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    memory = model(IDS).memory
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(IDS, IDS.roll(-1, 1), memory).loss_BS.mean()
    return loss, sum(saved.values())


@LAYERS
def test_recomputation_changes_no_bit_and_saves_memory(moe_layers: str) -> None:
    results: list[Any] = []
    for recompute in (False, True):
        model = model_for(moe_layers, recompute)
        loss, saved = loss_and_saved_bytes(model)
        loss.backward()
        results.append((loss, saved, {name: p.grad for name, p in model.named_parameters()}))
    (plain_loss, plain_saved, plain_gradients), (loss, saved, gradients) = results
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in plain_gradients)
    assert saved < 0.6 * plain_saved


def test_routing_is_never_recomputed() -> None:
    model = model_for("all", recompute=True)
    calls = []
    for layer in model.moe_layers:
        # Recomputation stops at the last tensor that was kept, before a hook behind the experts.
        layer.router.register_forward_pre_hook(lambda *_: calls.append("router"))
        layer.experts.register_forward_pre_hook(lambda *_: calls.append("experts"))
    model(IDS, IDS).loss_BS.sum().backward()
    assert calls.count("router") == 2
    assert calls.count("experts") == 4


def test_evaluation_keeps_nothing_to_recompute() -> None:
    model = model_for("all", recompute=True).eval()
    with torch.no_grad():
        assert model(IDS, IDS).loss_BS.grad_fn is None
