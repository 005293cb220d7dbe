"""A small training run on the ranks at hand, and what its checkpoints hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import read_memory, restore_checkpoint
from megamoe.checkpoint.shard import Slice
from megamoe.checkpoint.state import TrainingState
from megamoe.checkpoint.writer import CheckpointWriter, memory_slices
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.moe.initialization import generator
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import forget_groups, read_launch, start

VOCAB_SIZE = 32
RUN: dict[str, Any] = {
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24, "segment_len": 6,
        "memory_len": 8,
    },
    "moe": {"layers": "1", "n_experts": 4, "d_expert": 8, "router": {"hyper_size": 8}},
    "optimizer": {"lr": 1e-2},
    "training": {"batch_size": 4, "max_steps": 10},
}  # fmt: skip
FP32: dict[str, Any] = {}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}}
BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = BF16 | {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
OFFLOAD_ALL = BF16 | {
    "zero_optimization": {
        "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, "sub_group_size": 1000,
    }
}  # fmt: skip
ROUND_ROBIN = BF16 | {"zero_optimization": {"round_robin_gradients": True}}

Key = tuple[str, str]


def run_config(**updates: Any) -> RunConfig:
    return from_dict(merge(RUN, updates))


class SmallRun:
    """An engine with its memory, trained on random tokens that depend on the step alone."""

    def __init__(self, stage: int, ep_size: int, ds: Mapping[str, Any], **updates: Any) -> None:
        forget_groups()
        self.world = start(read_launch())
        self.run = run_config(**merge({"moe": {"ep_size": ep_size}}, updates))
        ds = resolve_ds_config(
            self.run, merge({"zero_optimization": {"stage": stage}}, ds), self.world.world_size,
            Device.detect(),
        )  # fmt: skip
        self.engine = Engine(self.run, ds, self.world, VOCAB_SIZE)
        # Dropout is the same whatever the seed, which tells apart initial values alone.
        self.engine.model.seed = 0
        self.memories: list[Any] = [None] * self.engine.micro_batches
        self.step = 0

    def train(self, n_steps: int, writer: CheckpointWriter | None = None) -> list[float]:
        """The losses of this rank, one per micro-batch; `writer` may have a save under way."""
        losses = []
        for _ in range(n_steps):
            for index, tokens_BS in enumerate(self.tokens().chunk(self.engine.micro_batches)):
                output = self.engine.forward(
                    tokens_BS[:, :-1], tokens_BS[:, 1:], self.memories[index], top_k=2, step=self.step,
                    rows=self.engine.micro_batch_rows(index),
                )  # fmt: skip
                self.memories[index] = output.memory
                loss = output.loss_BS.mean()
                self.engine.backward(loss)
                losses.append(loss.item())
            if writer is not None:
                writer.wait_for_copy()
            self.engine.step()
            self.step += 1
        return losses

    def evaluate(self) -> list[list[float]]:
        """Loss per token [B, S] of this rank's rows of the next batch, without memory."""
        self.engine.eval()
        tokens_BS = self.tokens()
        with torch.no_grad():
            return self.engine.forward(tokens_BS[:, :-1], tokens_BS[:, 1:], top_k=2).loss_BS.tolist()

    def memory(self) -> Iterable[Slice]:
        layers = [torch.cat(parts) for parts in zip(*self.memories, strict=True)]
        return memory_slices(layers, self.engine.rows, self.run.training.batch_size)

    def save(self, folder: Path, memory: Iterable[Slice] | None = None, **state: Any) -> None:
        self.start_save(CheckpointWriter(self.world), [folder], memory, **state)

    def start_save(
        self, writer: CheckpointWriter, folders: Sequence[Path], memory: Iterable[Slice] | None = None,
        **state: Any,
    ) -> list[Path]:  # fmt: skip
        return writer.save(
            folders, self.engine, TrainingState(step=self.step, **state),
            run=replace(self.run, model=self.engine.model.model_config),
            memory=self.memory() if memory is None else memory,
        )  # fmt: skip

    def load(self, folder: Path, **options: Any) -> TrainingState:
        reader = CheckpointReader(folder)
        state = restore_checkpoint(reader, self.engine, self.world, **options)
        layers = read_memory(reader, self.engine.rows, self.run.training.batch_size)
        parts = [layer.chunk(self.engine.micro_batches) for layer in layers]
        self.memories = list(zip(*parts, strict=True))
        self.step = state.step
        return state

    def tokens(self) -> torch.Tensor:
        """This rank's rows of the batch of the present step, [B, S + 1]."""
        size = (self.run.training.batch_size, self.run.model.segment_len + 1)
        tokens_BS = torch.randint(VOCAB_SIZE, size, generator=generator(0, "tokens", self.step))
        return tokens_BS[self.engine.rows.start : self.engine.rows.stop]


def held_tensors(folder: Path) -> dict[Key, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {(kind, name): reader.tensor(kind, name) for kind, name, _ in reader.manifest.entries()}


def differing(a: Path, b: Path) -> list[Key]:
    """Tensors that two checkpoints do not hold bit for bit alike."""
    ours, theirs = held_tensors(a), held_tensors(b)
    both = ours.keys() & theirs.keys()
    unequal = {
        key for key in both
        if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
    }  # fmt: skip
    return sorted((ours.keys() ^ theirs.keys()) | unequal)
