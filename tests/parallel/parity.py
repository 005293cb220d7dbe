"""What runs in the ranks of `test_engine`: many engines one after another, compared with plain torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param

from megamoe.config.schema import RouterConfig, RunConfig
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.parallel.engine import Engine, require_equal_buffers
from megamoe.parallel.launch import World, read_launch, start
from tests.moe.policies import oracle_cases
from tests.parallel.runs import (
    VOCAB,
    Trajectory,
    batch,
    build_engine,
    deviations,
    full_weight,
    largest_difference,
    run_engine,
    run_plain,
    small_run,
)

# Accumulation takes the balance loss of each micro-batch, which is another loss than the big batch's.
NO_BALANCE = {"balance_loss": 0.0}
NO_CLIP = {"grad_clip": 0.0}
SEED = 2


@dataclass(frozen=True)
class Case:
    """One engine: ep_size, ZeRO stage, and what else differs from `SMALL`."""

    ep_size: int
    stage: int
    name: str = ""
    moe: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"ep{self.ep_size}-zero{self.stage}{self.name and '-'}{self.name}"


def cases(world_size: int) -> Iterator[Case]:
    """Every ep_size and stage of a world; on two ranks also what else must not change the numbers."""
    for ep_size in (1, 2, 4):
        if world_size % ep_size == 0:
            yield Case(ep_size, 0, "unclipped", training=NO_CLIP)
            yield Case(ep_size, 1)
            yield Case(ep_size, 2)
    yield Case(1, 0)
    yield Case(1, 3)
    if world_size == 2:
        accumulate = {"micro_batch_size": 2}
        yield Case(2, 1, "accumulated", moe=NO_BALANCE, training=accumulate)
        yield Case(2, 2, "accumulated", moe=NO_BALANCE, training=accumulate)
        yield Case(2, 1, "checkpointed", training={"activation_checkpointing": True})
        yield Case(1, 3, "checkpointed", training={"activation_checkpointing": True})
        # Every parameter is gathered when needed and given up after, which small ones are spared by default.
        yield Case(1, 3, "all-partitioned", zero={"stage3_param_persistence_threshold": 0})
        # Several messages for each step, and tensors that are larger than one.
        yield Case(2, 1, "small-buckets", zero={"reduce_bucket_size": 500})
        yield Case(2, 1, "offloaded", zero={"offload_optimizer": {"device": "cpu"}})
        yield Case(2, 1, "one-mixture", moe={"layers": "1"})
        yield Case(1, 1, "no-mixture", moe={"layers": "none"})


def parity(world_size: int) -> dict[str, dict[str, float]]:
    """Deviations of every case from plain torch, on this rank."""
    world = start(read_launch())
    references: dict[str, Trajectory] = {}
    result = {}
    for case in cases(world_size):
        plain = {key: value for key, value in case.training.items() if key == "grad_clip"}
        key = repr((case.moe, plain))
        if key not in references:
            references[key] = run_plain(small_run(moe=case.moe, training=plain))
        run = small_run(moe=case.moe | {"ep_size": case.ep_size}, training=case.training)
        ds = {"zero_optimization": {"stage": case.stage, **case.zero}}
        trajectory, engine = run_engine(run, ds, world)
        result[str(case)] = deviations(trajectory, references[key], engine)
    return result


def policy_runs() -> dict[str, RunConfig]:
    """One small run for every registered policy with each of the options that its oracle is tried with."""
    # A seed with which no choice is so close that the order of a sum decides it.
    run = small_run(moe={"n_experts": 4, "balance_loss": "auto", "z_loss": 0.0}, training={"seed": SEED})
    return {
        f"{name} {options}": replace(
            run, moe=replace(run.moe, router=RouterConfig(name=name, options=options))
        )
        for name, options in oracle_cases()
    }


def policy_parity(
    ep_size: int, stages: tuple[int, ...], part: int, n_parts: int
) -> dict[str, dict[str, float]]:
    """Deviations of every policy from plain torch, on this rank; ZeRO stages take turns."""
    world = start(read_launch())
    result = {}
    for index, (key, run) in enumerate(policy_runs().items()):
        if index % n_parts == part:
            spread = replace(run, moe=replace(run.moe, ep_size=ep_size))
            ds = {"zero_optimization": {"stage": stages[index // n_parts % len(stages)]}}
            trajectory, engine = run_engine(spread, ds, world)
            result[key] = deviations(trajectory, run_plain(run), engine)
    return result


def behaviour() -> dict[str, Any]:
    """Facts about engines on two ranks, as plain values for the tests to judge."""
    world = start(read_launch())
    return {
        "bf16": _bf16(world),
        "skips": {stage: _skip(world, stage) for stage in range(4)},
        "buffers": _unequal_buffers(world),
        "collectives": _collectives(world),
        "learning_rate": _learning_rate(world),
        "dropout": _dropout(world),
    }


def _bf16(world: World) -> dict[str, Any]:
    ds = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    # At all experts: a token on the edge between two would take the other one after any rounding.
    moe = {"top_k": small_run().moe.n_experts}
    exact = run_plain(small_run(moe=moe))
    plain = run_plain(small_run(moe=moe), torch.bfloat16)
    one, whole = run_engine(small_run(moe=moe | {"ep_size": 1}), ds, world)
    two, engine = run_engine(small_run(moe=moe | {"ep_size": 2}), ds, world)
    trained = {id(p) for group in engine.deepspeed.basic_optimizer.param_groups for p in group["params"]}
    return {
        "first_loss": (one.losses[0], plain.losses[0]),
        "first_norm": (one.norms[0], plain.norms[0]),
        "first_gradient": largest_difference(one.gradients[0], plain.gradients[0], whole),
        "losses": (two.losses, one.losses),
        "rounding_whole": largest_difference(one.gradients[0], exact.gradients[0], whole),
        "rounding_spread": largest_difference(two.gradients[0], exact.gradients[0], engine),
        "parameters": {str(p.dtype) for p in engine.model.parameters()},
        "buffers": {str(buffer.dtype) for buffer in engine.model.buffers()},
        "n_buffers": len(list(engine.model.buffers())),
        "buffers_trained": [name for name, b in engine.model.named_buffers() if id(b) in trained],
    }


def _skip(world: World, stage: int) -> dict[str, Any]:
    """Two steps; on the second, one rank's gradients are not finite."""
    run = small_run(moe={"ep_size": 1 if stage == 3 else 2}, training=NO_CLIP)
    engine = build_engine(run, {"zero_optimization": {"stage": stage}}, world)
    steps, weights = [], []
    for factor in (1.0, math.nan if world.rank == 1 else 1.0):
        _train_step(engine, world, factor)
        steps.append(engine.step())
        weights.append([full_weight(p) for p in engine.model.parameters()])
    return {
        "skipped": [step.skipped for step in steps],
        "norms": [step.grad_norm.item() for step in steps],
        "unchanged": all(torch.equal(a, b) for a, b in zip(*weights, strict=True)),
        "counted": (engine.deepspeed.global_steps, engine.deepspeed.skipped_steps),
    }


def _train_step(engine: Engine, world: World, factor: float = 1.0) -> torch.Tensor:
    rows = batch(0)[engine.rows.start : engine.rows.stop]
    output = engine.forward(rows[:, :-1], rows[:, 1:])
    extra, _ = auxiliary_loss(output.routings, engine.model.moe_config, world.mean)
    loss = output.loss_BS.mean()
    engine.backward((loss + extra) * factor)
    return loss.detach()


def _unequal_buffers(world: World) -> str:
    """The message when one rank's hypernetwork differs by the smallest amount."""
    engine = build_engine(small_run(), {"zero_optimization": {"stage": 1}}, world)
    buffer = next(engine.model.buffers())
    if world.rank == 1:
        buffer.view(-1)[0] = torch.nextafter(buffer.view(-1)[0], torch.tensor(9.0))
    try:
        require_equal_buffers(engine.model, world)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _collectives(world: World) -> dict[str, Any]:
    values = torch.tensor([1.0, 2.0], requires_grad=True) * (world.rank + 1)
    mean = world.mean(values)
    return {
        "mean": mean.tolist(),
        "sum": world.sum(values).tolist(),
        "own_value_kept": values.tolist() == [world.rank + 1, 2 * (world.rank + 1)],
        "needs_grad": mean.requires_grad,
        "gathered": world.gather_objects({"rank": world.rank}),
        "gathered_on_main": world.gather_on_main({"rank": world.rank}),
        "is_main": world.is_main,
    }


def _learning_rate(world: World) -> dict[str, Any]:
    """At a rate of 0 nothing moves, whatever the group."""
    engine = build_engine(
        small_run(moe={"ep_size": 2}, optimizer={"weight_decay": 0.1}),
        {"zero_optimization": {"stage": 1}},
        world,
    )
    before = [full_weight(p) for p in engine.model.parameters()]
    engine.set_learning_rate(0.0)
    _train_step(engine, world)
    engine.step()
    return {
        "unchanged": all(map(torch.equal, before, (full_weight(p) for p in engine.model.parameters()))),
        "experts_marked": sorted(name for name, p in engine.model.named_parameters() if is_moe_param(p)),
    }


def _dropout(world: World) -> dict[str, Any]:
    """Random in training, deterministic in evaluation."""
    run = small_run(model={"dropout": 0.5})
    engine = build_engine(run, {"zero_optimization": {"stage": 1}}, world)
    ids = torch.arange(8).view(1, 8) % VOCAB

    def losses() -> list[float]:
        with torch.no_grad():
            return [engine.forward(ids, ids, step=step).loss_BS.mean().item() for step in range(2)]

    engine.train()
    in_training = losses()
    engine.eval()
    return {"training": in_training, "evaluation": losses()}
