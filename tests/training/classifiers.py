"""A small language model, and classifiers fine-tuned from it on sentences that a few words decide."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint.reader import CheckpointReader, find_latest
from megamoe.config.load import merge
from megamoe.config.schema import RunConfig
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.launch import World, forget_groups
from megamoe.training.callbacks import build_callbacks
from megamoe.training.classifier_trainer import ClassifierTrainer
from megamoe.training.finetune import configure_finetuning, read_sentences
from megamoe.training.run_folder import RunFolder
from tests.training.runs import FP32, CutError, Recorder, build_trainer, corpus_of, toy_run

LAST_STEP = 14
# Adam's eps is above the noise of summation order, so that a gradient which is zero up to noise moves its
# weight equally little however ranks are laid out.
SETTINGS = (
    "task.name=sst2", "model.segment_len=24", "model.memory_len=10", "task.bucket=2", "optimizer.lr=1e-2",
    "optimizer.warmup_steps=0", "optimizer.eps=1e-4", "training.batch_size=4",
    f"training.max_steps={LAST_STEP}", "evaluation.batch_size=3", "evaluation.every=4",
    "evaluation.memory_len=6", "evaluation.top_ks=1,4", "checkpoint.every=5", "logging.every=1",
    "logging.tensorboard=false",
)  # fmt: skip
WORDS = (("dull", "bad", "thin"), ("fun", "good", "witty"))


def write_sentences(folder: Path, n_train: int = 40) -> Path:
    """A folder in the form of SST-2, in which the last word tells the class."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split, n in (("train", n_train), ("dev", 12), ("test", 14)):
        lines = ["sentence\tlabel"]
        for i in range(n):
            label = i % 2
            start = " ".join(generator.choice(["it", "is", "so", "a", "film"], generator.integers(0, 4)))
            lines.append(f"{split}{i} {start} {generator.choice(WORDS[label])}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def train_language_model(folder: Path, world: World, **updates: Any) -> Path:
    """Two steps of one on bytes; its checkpoint."""
    text = np.frombuffer(b"it is so dull, it is fun; a good film, a bad film. " * 20, np.uint8)
    quick = {"training": {"max_steps": 2}, "evaluation": {"every": 0, "top_ks": [4]}}
    run = toy_run(folder, **merge(merge({"name": "language"}, quick), updates))
    corpus = corpus_of({"train": text, "valid": text[:200], "test": text[:200]}, ByteTokenizer())
    build_trainer(run, FP32, world, [], corpus).train()
    found = find_latest(RunFolder.of(run).root)
    assert found is not None
    return found


def classifier_run(checkpoint: Path, name: str, *overrides: str, recipe: str = "transfer") -> RunConfig:
    """Beside the run of the language model, on sentences in the folder beside both."""
    runs = checkpoint.parents[2]
    places = (f"output_dir={runs}", f"name={name}", f"task.path={runs.parent / 'sentences'}")
    return configure_finetuning(checkpoint, recipe, "", [*SETTINGS, *places, *overrides])


def build_classifier(
    run: RunConfig, ds: Mapping[str, Any], world: World, recorder: Recorder
) -> ClassifierTrainer:
    forget_groups()
    run, sentences = read_sentences(run)
    folder = RunFolder.of(run)
    folder.root.mkdir(parents=True, exist_ok=True)
    ds = resolve_ds_config(run, ds, world.world_size, Device.detect())
    callbacks = [*build_callbacks(run, folder, is_main=world.is_main), recorder]
    return ClassifierTrainer(run, ds, world, sentences, folder, callbacks)


def fine_tune(
    run: RunConfig,
    world: World,
    ds: Mapping[str, Any] = FP32,
    *,
    cut_after: int = 0,
    resume: Path | None = None,
) -> Recorder:
    """To the end or to the cut; from the language model, or from a checkpoint if one is given."""
    recorder = Recorder(cut_after)
    trainer = build_classifier(run, ds, world, recorder)
    if resume is None:
        trainer.begin()
    else:
        trainer.resume(CheckpointReader(resume))
    with suppress(CutError):
        trainer.train()
    return recorder
