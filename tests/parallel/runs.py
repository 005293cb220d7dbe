"""The same small run twice: under DeepSpeed on several ranks, and in plain torch in one process."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from megamoe.config.load import from_dict, merge
from megamoe.config.schema import RunConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.updates import update_routers
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import World, forget_groups

VOCAB, BATCH, SEGMENT, STEPS = 40, 8, 8, 3

# Wide initial weights make routing uneven. Adam's eps is above the noise of summation order, so that a
# gradient which is zero up to noise moves its weight equally little in both runs.
SMALL: dict[str, Any] = {
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24, "dropout": 0.1,
        "attention_dropout": 0.1, "segment_len": SEGMENT, "memory_len": SEGMENT, "init_std": 0.3,
    },
    "moe": {
        "n_experts": 8, "d_expert": 12, "top_k": 2, "balance_loss": 0.1, "z_loss": 0.01,
        "router": {"name": "hyper", "hyper_size": 8},
    },
    "optimizer": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "name": "adamw"},
    "training": {"batch_size": BATCH, "grad_clip": 0.5},
}  # fmt: skip


def small_run(**sections: Mapping[str, Any]) -> RunConfig:
    return from_dict(merge(SMALL, sections))


@dataclass
class Trajectory:
    """Per step: loss of the global batch, named auxiliary losses, norm, gradients; then weights, buffers."""

    losses: list[float] = field(default_factory=list)
    auxiliary: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


def batch(step: int) -> torch.Tensor:
    """Row b, step s of token streams in which tokens repeat, so that memory matters; [B, S + 1]."""
    generator = torch.Generator().manual_seed(7)
    text_BN = torch.randint(0, VOCAB, (BATCH, STEPS * SEGMENT + 1), generator=generator)
    return text_BN[:, step * SEGMENT : (step + 1) * SEGMENT + 1]


def domains(rows: range) -> torch.Tensor:
    """Source and target domain of rows of the batch, for policies that look at them; [B, 2]."""
    row_B = torch.arange(rows.start, rows.stop)
    return torch.stack([row_B % 3, (row_B + 1) % 3], 1)


def run_plain(run: RunConfig, dtype: torch.dtype = torch.float32) -> Trajectory:
    """One process, no DeepSpeed, no exchange, the global batch at once; without masters in half precision."""
    model = TransformerXL(replace(run.model, vocab_size=VOCAB), run.moe, seed=run.training.seed)
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    config = run.optimizer
    matrices = [p for name, p in model.named_parameters() if _decays(name, p)]
    others = [p for name, p in model.named_parameters() if not _decays(name, p)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr, betas=config.betas, eps=config.eps,
    )  # fmt: skip
    result, memory = Trajectory(), None
    for step in range(STEPS):
        ids_BS, targets_BS = batch(step)[:, :-1], batch(step)[:, 1:]
        output = model(ids_BS, targets_BS, memory, step=step, domains_B2=domains(range(BATCH)))
        memory = output.memory
        loss = output.loss_BS.mean()
        extra, raw = auxiliary_loss(output.routings, run.moe, ONE_RANK.mean)
        optimizer.zero_grad()
        (loss + extra).backward()
        result.losses.append(loss.item())
        result.auxiliary.append({name: value.item() for name, value in raw.items()})
        result.gradients.append({name: _or_zeros(p.grad, p) for name, p in model.named_parameters()})
        for parameter in model.parameters():  # as DeepSpeed, which knows no missing gradients
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        clip = run.training.grad_clip or float("inf")
        result.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        update_routers([layer.router for layer in model.moe_layers], [output.routings], ONE_RANK, step)
    result.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def _or_zeros(gradient: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy in fp32; zeros for a parameter that took no part in the step."""
    return torch.zeros_like(parameter).float() if gradient is None else gradient.float().clone()


def _decays(name: str, parameter: torch.nn.Parameter) -> bool:
    spared = ("bias", "b_in", "b_out", "norm", "router.v_", "router.u_")
    return parameter.dim() > 1 and not any(part in name for part in spared)


def build_engine(run: RunConfig, ds: Mapping[str, Any], world: World) -> Engine:
    """A fresh engine whose rank has random numbers of its own, which must not matter."""
    forget_groups()
    torch.manual_seed(1000 + world.rank)
    return Engine(run, resolve_ds_config(run, ds, world.world_size, Device.detect()), world, VOCAB)


def run_engine(run: RunConfig, ds: Mapping[str, Any], world: World) -> tuple[Trajectory, Engine]:
    """The same under DeepSpeed; gradients and weights are those this rank holds, in fp32."""
    engine = build_engine(run, ds, world)
    result = Trajectory()
    memories: list[Any] = [None] * engine.micro_batches
    for step in range(STEPS):
        losses, raws, routings = [], [], []
        for i in range(engine.micro_batches):
            rows = engine.micro_batch_rows(i)
            rows_BN = batch(step)[rows.start : rows.stop]
            output = engine.forward(
                rows_BN[:, :-1], rows_BN[:, 1:], memories[i], step=step, rows=rows, domains_B2=domains(rows)
            )
            memories[i] = output.memory
            extra, raw = auxiliary_loss(output.routings, run.moe, world.mean)
            losses.append(output.loss_BS.mean())
            raws.append(raw)
            routings.append(output.routings)
            engine.backward(losses[-1] + extra)
        result.losses.append(world.mean(torch.stack(losses).mean()).item())
        means = {name: torch.stack([raw[name] for raw in raws]).mean() for name in raws[0]}
        result.auxiliary.append({name: world.mean(value).item() for name, value in means.items()})
        result.gradients.append(
            {name: _or_zeros(safe_get_full_grad(p), p) for name, p in engine.model.named_parameters()}
        )
        result.norms.append(engine.step().grad_norm.item())
        update_routers([layer.router for layer in engine.model.moe_layers], routings, world, step)
    result.buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    result.weights = {name: full_weight(p) for name, p in engine.model.named_parameters()}
    return result, engine


def full_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 value of a parameter wherever ZeRO keeps it; of experts, those this rank holds."""
    master = safe_get_full_fp32_param(parameter)
    return (parameter.detach() if master is None else master).float().clone()


def deviations(mine: Trajectory, reference: Trajectory, engine: Engine) -> dict[str, float]:
    """Largest differences between two runs; of a gradient relative to the largest entry of its tensor."""
    return {
        "loss": max(abs(a - b) for a, b in zip(mine.losses, reference.losses, strict=True)),
        "auxiliary": max(
            (
                abs(a[name] - b[name])
                for a, b in zip(mine.auxiliary, reference.auxiliary, strict=True)
                for name in b
            ),
            default=0.0,
        ),
        "norm": max(abs(a / b - 1) for a, b in zip(mine.norms, reference.norms, strict=True)),
        "gradient": max(
            largest_difference(a, b, engine) for a, b in zip(mine.gradients, reference.gradients, strict=True)
        ),
        "weight": largest_difference(mine.weights, reference.weights, engine, relative=False),
        "buffer": largest_difference(mine.buffers, reference.buffers, engine),
    }  # fmt: skip


def largest_difference(
    mine: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    engine: Engine,
    *,
    relative: bool = True,
) -> float:
    assert mine.keys() == reference.keys()
    worst = 0.0
    for name, tensor in mine.items():
        expected = reference[name]
        if ".experts." in name:
            local = engine.model.moe_layers[0].experts.local
            expected = expected[local.start : local.stop]
        scale = reference[name].abs().max().clamp_min(1e-6) if relative else 1.0
        worst = max(worst, ((tensor - expected).abs().max() / scale).item())
    return worst
