"""Twenty optimiser steps of the published trainer, and what its checkpoint scores at every k."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

from megamoe.models.attention import AttentionSpan
from megamoe.models.reference_names import from_reference, optimizer_order, to_reference
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.schedules import top_k_at
from tests.models.goldens import Golden, golden_names


def segments(tokens: torch.Tensor, batch: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of one epoch, [B, S] each, the last one shorter."""
    rows = tokens[: len(tokens) // batch * batch].view(batch, -1).long()
    starts = range(0, rows.shape[1] - 1, length)
    stops = [min(start + length, rows.shape[1] - 1) for start in starts]
    return [(rows[:, a:b], rows[:, a + 1 : b + 1]) for a, b in zip(starts, stops, strict=True)]


@torch.no_grad()
def evaluate(model: TransformerXL, golden: Golden, split: str, k: int | None) -> float:
    """Nats per token by the published protocol."""
    config = golden.config
    length = config["eval_tgt_len"]
    span = AttentionSpan(memory_len=config["mem_len"] + config["tgt_len"] - length)
    memory, total, tokens = None, 0.0, 0
    model.eval()
    for inputs, targets in segments(golden.arrays[f"{split}_ids"], config["eval_batch_size"], length):
        output = model(inputs, targets, memory, top_k=k, span=span)
        memory = output.memory
        total += output.loss_BS.double().sum().item()
        tokens += targets.numel()
    model.train()
    return total / tokens


def train(model: TransformerXL, golden: Golden) -> Iterator[dict[str, float]]:
    config = golden.config
    epoch = segments(golden.arrays["train_ids"], config["batch_size"], config["tgt_len"])
    assert [inputs.shape[1] for inputs, _ in epoch] == golden.facts["segment_lengths_per_epoch"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config["lr"])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["max_step"])
    memory = None
    for step in range(golden.facts["steps"]):
        top_k = top_k_at(golden.moe_config.schedule, golden.moe_config.top_k, step, config["max_step"])
        inputs, targets = epoch[step % len(epoch)]
        output = model(inputs, targets, memory if step % len(epoch) else None, top_k=top_k, step=step)
        memory = output.memory
        loss = output.loss_BS.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(parameters, config["clip"])
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        cosine.step()
        yield {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "top_k": top_k}


@pytest.mark.parametrize("name", golden_names("trajectory"))
def test_published_trajectory(name: str) -> None:
    golden = Golden("trajectory", name)
    model = golden.model("init/")
    steps = []
    for step in train(model, golden):
        steps.append(step)
        check_logged_evaluations(model, golden, len(steps))

    for quantity, tolerance in {"loss": 5e-6, "grad_norm": 5e-6, "lr": 1e-12, "top_k": 0}.items():
        if quantity != "top_k" or golden.config["moe"]:
            ours = torch.tensor([step[quantity] for step in steps], dtype=torch.float64)
            assert_close(ours, golden.arrays[quantity].double(), atol=tolerance, rtol=0)
    final = golden.state("final/")
    ours = model.state_dict()
    for key, tensor in golden.state("init/").items():
        frozen = key not in final  # the hypernetwork
        assert_close(ours[key], tensor if frozen else final[key], atol=0 if frozen else 1e-4, rtol=0)
    for k, published in golden.facts["val_test_loss_by_k"].items():
        for split, loss in published.items():
            assert evaluate(model, golden, split, int(k) or None) == pytest.approx(loss, abs=1e-5)


def check_logged_evaluations(model: TransformerXL, golden: Golden, step: int) -> None:
    for logged in golden.facts["evaluations_logged"]:
        if logged["step"] == step:
            k = golden.moe_config.n_experts if logged["k"] == "all" else None
            bits = evaluate(model, golden, "valid", k) / math.log(2)
            assert bits == pytest.approx(logged["bpc"], abs=2e-5)


@pytest.mark.parametrize("name", golden_names("trajectory"))
def test_optimizer_order(name: str) -> None:
    golden = Golden("trajectory", name)
    model = golden.model("init/")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    theirs = to_reference(model.state_dict(), golden.model_config)
    names = [key for key in theirs if set(from_reference({key: theirs[key]}, golden.model_config)) & trained]
    assert optimizer_order(reversed(names)) == golden.facts["trainable"]
