"""A small training run on given ranks, and what its checkpoints hold."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import read_memory, restore_checkpoint
from megamoe.checkpoint.state import TrainingState
from megamoe.checkpoint.writer import memory_slices, save_checkpoint
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.moe.initialization import generator
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import World, forget_groups, read_launch, start

VOCAB_SIZE = 32
RUN: dict[str, Any] = {
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24, "segment_len": 6,
        "memory_len": 8,
    },
    "moe": {"layers": "1", "n_experts": 4, "d_expert": 8, "balance_loss": 0.01, "router": {"hyper_size": 8}},
    "optimizer": {"lr": 1e-2},
    "training": {"batch_size": 4, "max_steps": 10},
}  # fmt: skip
FP32: dict[str, Any] = {}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def run_config(**updates: Any) -> RunConfig:
    return from_dict(merge(RUN, updates))


class SmallRun:
    """An engine with its memory, trained on random tokens that depend on the step alone."""

    def __init__(self, stage: int, ep_size: int, precision: dict[str, Any], **updates: Any) -> None:
        forget_groups()
        self.world: World = start(read_launch())
        self.run = run_config(**merge({"moe": {"ep_size": ep_size}}, updates))
        ds = {"zero_optimization": {"stage": stage}} | precision
        ds_config = resolve_ds_config(self.run, ds, self.world.world_size, Device.detect())
        self.engine = Engine(self.run, ds_config, self.world, VOCAB_SIZE)
        self.memories: list[tuple[torch.Tensor, ...] | None] = [None] * self.engine.micro_batches
        self.step = 0

    def train(self, n_steps: int) -> list[float]:
        """The losses of this rank."""
        losses = []
        for _ in range(n_steps):
            tokens_BS = torch.randint(
                VOCAB_SIZE, (self.run.training.batch_size, 7), generator=generator(0, "tokens", self.step)
            )[self.engine.rows.start : self.engine.rows.stop]
            for index, part_BS in enumerate(tokens_BS.chunk(self.engine.micro_batches)):
                torch.manual_seed(1000 * self.step + 10 * index + self.world.rank)
                output = self.engine.forward(
                    part_BS[:, :-1], part_BS[:, 1:], self.memories[index], top_k=2, step=self.step
                )
                loss = output.loss_BS.mean()
                self.engine.backward(loss)
                self.memories[index] = output.memory
                losses.append(loss.item())
            self.engine.step()
            self.step += 1
        return losses

    def save(self, folder: Path, **state: Any) -> None:
        parts = [memory for memory in self.memories if memory is not None]
        memory = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        save_checkpoint(
            folder, self.engine, TrainingState(step=self.step, **state), self.world,
            run=replace(self.run, model=self.engine.model.model_config),
            memory=memory_slices(memory, self.engine.rows, self.run.training.batch_size),
        )  # fmt: skip

    def load(self, folder: Path, **options: Any) -> TrainingState:
        reader = CheckpointReader(folder)
        state = restore_checkpoint(reader, self.engine, self.world, **options)
        memory = read_memory(reader, self.engine.rows, self.run.training.batch_size)
        if memory:
            parts = [layer.chunk(self.engine.micro_batches) for layer in memory]
            self.memories = list(zip(*parts, strict=True))
        self.step = state.step
        return state


def held_tensors(folder: Path, kinds: Iterable[str] = ()) -> dict[tuple[str, str], torch.Tensor]:
    reader = CheckpointReader(folder)
    wanted = kinds or reader.manifest.tensors
    return {(kind, name): reader.tensor(kind, name) for kind in wanted for name in reader.names(kind)}


def differing(a: Path, b: Path) -> list[tuple[str, str]]:
    """Tensors that are not the same bit for bit in two checkpoints."""
    ours, theirs = held_tensors(a), held_tensors(b)
    return sorted(
        key
        for key in ours.keys() | theirs.keys()
        if key not in ours
        or key not in theirs
        or ours[key].dtype != theirs[key].dtype
        or not torch.equal(ours[key], theirs[key])
    )
