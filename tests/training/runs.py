"""Small runs through the real engine and trainer, on whatever ranks call them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config import RunConfig, from_dict
from megamoe.config.load import merge
from megamoe.data.corpus import Corpus
from megamoe.data.domains import Domains
from megamoe.data.tokenizers import ReferenceSymbolTokenizer, Tokenizer
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.launch import World, forget_groups
from megamoe.training.callbacks import Callback, StepRecord, build_callbacks
from megamoe.training.evaluation import Evaluation
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import with_vocabulary
from megamoe.training.trainer import Trainer

FP32: dict[str, Any] = {"zero_optimization": {"stage": 1}}
BF16 = FP32 | {"bf16": {"enabled": True}}

# k rises, the epoch ends inside the run, dropout is on: everything that a resumed run must get right.
TOY: dict[str, Any] = {
    "name": "toy",
    "model": {
        "n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_inner": 24, "dropout": 0.1,
        "segment_len": 6, "memory_len": 8, "init_std": 0.2,
    },
    "moe": {
        "n_experts": 4, "d_expert": 8, "top_k": 2, "router": {"hyper_size": 8},
        "schedule": {"mode": "linear_increase", "min_k": 1, "max_k": 4, "steps": 12},
    },
    "optimizer": {"lr": 5e-2, "schedule": "plateau", "warmup_steps": 3},
    "training": {"batch_size": 4, "max_steps": 14},
    "evaluation": {"every": 2, "batch_size": 3, "segment_len": 4, "top_ks": [1, 2, 4]},
    "checkpoint": {"every": 5},
    "logging": {"every": 1, "tensorboard": False},
}  # fmt: skip


class CutError(Exception):
    """Raised where a test cuts a run."""


class Recorder(Callback):
    """Keeps what a trainer tells, and cuts the run after `cut_after` steps."""

    def __init__(self, cut_after: int = 0) -> None:
        self.cut_after = cut_after
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.errors: list[BaseException] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        names = ("step", "lr", "top_k", "skipped", "tokens")
        values = {name: getattr(record, name) for name in names}
        self.steps.append(values | {name: float(getattr(record, name)) for name in ("loss", "grad_norm")})
        if record.step == self.cut_after:
            trainer.wait_for_save()
            raise CutError

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self.evaluations.append((trainer.step, evaluation))

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.errors.append(error)


def toy_run(folder: Path, **updates: Any) -> RunConfig:
    return from_dict(merge(merge(TOY, {"output_dir": str(folder)}), updates))


def corpus_of(tokens: Mapping[str, np.ndarray], tokenizer: Tokenizer, **facts: Any) -> Corpus:
    named = {"name": "toy text", "unit": "symbol", "is_sample": True, "note": ""}
    return Corpus(tokens=tokens, tokenizer=tokenizer, **(named | facts))


def toy_corpus(vocab_size: int = 11) -> Corpus:
    """Text with some structure; eleven segments of six to an epoch of four streams, the last one short."""
    generator = np.random.default_rng(3)
    lengths = {"train": 256, "valid": 101, "test": 97}
    tokens = {
        split: (np.arange(length) ** 2 // 3 + generator.integers(0, 3, length)).astype(np.uint8) % vocab_size
        for split, length in lengths.items()
    }
    spans = Domains(np.array([0, 60, 90]), np.array([[1, 1], [2, 1], [0, 0]]))
    tokenizer = ReferenceSymbolTokenizer(range(97, 97 + vocab_size))
    return corpus_of(tokens, tokenizer, domains=dict.fromkeys(tokens, spans))


def build_trainer(
    run: RunConfig,
    ds: Mapping[str, Any],
    world: World,
    callbacks: Sequence[Callback],
    corpus: Corpus | None = None,
) -> Trainer:
    """A trainer with the callbacks that `run` asks for and these."""
    forget_groups()
    corpus = corpus or toy_corpus()
    run = with_vocabulary(run, corpus)
    folder = RunFolder.of(run)
    folder.root.mkdir(parents=True, exist_ok=True)
    ds = resolve_ds_config(run, ds, world.world_size, Device.detect())
    own = build_callbacks(run, folder, is_main=world.is_main)
    return Trainer(run, ds, world, corpus, folder, [*own, *callbacks])


def train_toy(
    run: RunConfig, ds: Mapping[str, Any], world: World, *, cut_after: int = 0, resume: Path | None = None
) -> Recorder:
    """Train to the end or to the cut; from a checkpoint if one is given."""
    recorder = Recorder(cut_after)
    trainer = build_trainer(run, ds, world, [recorder])
    if resume is not None:
        trainer.resume(CheckpointReader(resume))
    with suppress(CutError):
        trainer.train()
    return recorder
