"""Twenty steps of the published trainer, through the trainer, the engine and DeepSpeed on one rank."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megamoe.data.tokenizers import ReferenceSymbolTokenizer
from megamoe.parallel.fragments import publish_weights, restore_fragments
from megamoe.parallel.launch import Launch, start
from megamoe.training.evaluation import NO_EXPERTS, evaluate
from tests.models.goldens import Golden, golden_names
from tests.ranks import run_ranks
from tests.training.runs import FP32, CutError, Recorder, build_trainer, corpus_of

TOLERANCES = {"loss": 5e-6, "grad_norm": 5e-6, "lr": 1e-12, "top_k": 0}


def run_of(golden: Golden, folder: Path) -> RunConfig:
    config = golden.config
    return RunConfig(
        name=golden.facts["name"],
        output_dir=str(folder),
        model=golden.model_config,
        moe=golden.moe_config,
        optimizer=OptimizerConfig(
            name=config["optim"], lr=config["lr"], schedule=config["scheduler"],
            warmup_steps=config["warmup_step"], min_lr=config["eta_min"],
        ),
        training=TrainingConfig(
            max_steps=config["max_step"], batch_size=config["batch_size"], grad_clip=config["clip"]
        ),
        evaluation=EvaluationConfig(
            every=config["eval_interval"], batch_size=config["eval_batch_size"],
            segment_len=config["eval_tgt_len"], top_ks=(1, 2, 3, 4),
        ),
        checkpoint=CheckpointConfig(every=golden.facts["steps"]),
        logging=LoggingConfig(every=1, tensorboard=False),
    )  # fmt: skip


def train_golden(name: str, stage: int, folder: str) -> dict[str, Any]:
    """What the run did step by step, its evaluations, its weights, and what its checkpoint scores."""
    world = start(Launch())
    golden = Golden("trajectory", name)
    run = run_of(golden, Path(folder))
    symbols = ReferenceSymbolTokenizer([int(symbol) for symbol in golden.facts["vocab"]])
    tokens = {split: golden.arrays[f"{split}_ids"].numpy() for split in ("train", "valid", "test")}
    corpus = corpus_of(tokens, symbols)
    recorder = Recorder(cut_after=golden.facts["steps"])
    trainer = build_trainer(run, FP32 | {"zero_optimization": {"stage": stage}}, world, [recorder], corpus)
    initial = {key: tensor.flatten() for key, tensor in golden.state("init/").items()}
    restore_fragments(trainer.engine, lambda kind, key, a, b: initial[key][a:b], optimizer_step=0)
    publish_weights(trainer.engine)
    with suppress(CutError):
        trainer.train()
    reader = CheckpointReader(trainer.last_checkpoint)
    model = load_model(reader.folder)
    scored = [int(k) for k in golden.facts["val_test_loss_by_k"]]

    def score(split: str) -> dict[int, float]:
        return evaluate(model, corpus, split, scored, run, world).nats

    return {
        "steps": recorder.steps,
        "evaluations": [(step, evaluation.nats) for step, evaluation in recorder.evaluations],
        "weights": {key: reader.tensor(kind, key).numpy() for kind, key, _ in reader.manifest.entries()
                    if kind in ("weight", "buffer")},
        "scores": {split: score(split) for split in ("valid", "test")},
    }  # fmt: skip


def train_all(folder: str) -> dict[str, Any]:
    results = {name: train_golden(name, 1, f"{folder}/zero1") for name in golden_names("trajectory")}
    return results | {"stage 0": train_golden("hyperrouter_dynamic", 0, f"{folder}/zero0")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(train_all, 1, str(tmp_path_factory.mktemp("goldens")))[0]


@pytest.mark.parametrize("name", golden_names("trajectory"))
def test_published_trajectory(name: str, results: dict[str, Any]) -> None:
    golden, result = Golden("trajectory", name), results[name]
    for quantity, tolerance in TOLERANCES.items():
        if quantity != "top_k" or golden.config["moe"]:
            ours = [step[quantity] for step in result["steps"]]
            np.testing.assert_allclose(ours, golden.arrays[quantity].numpy(), atol=tolerance, rtol=0)
    final = golden.state("final/")
    for key, initial in golden.state("init/").items():
        expected = final.get(key, initial)  # the hypernetwork does not move
        np.testing.assert_allclose(result["weights"][key], expected.numpy(), atol=1e-4, rtol=0)
        assert key in final or (result["weights"][key] == initial.numpy()).all()


@pytest.mark.parametrize("name", golden_names("trajectory"))
def test_published_evaluations(name: str, results: dict[str, Any]) -> None:
    golden, result = Golden("trajectory", name), results[name]
    in_training = dict(result["evaluations"])
    for logged in golden.facts["evaluations_logged"]:
        nats = in_training[logged["step"]]
        k = max(nats) if logged["k"] == "all" else min(nats)
        assert nats[k] / np.log(2) == pytest.approx(logged["bpc"], abs=2e-5)
    for k, published in golden.facts["val_test_loss_by_k"].items():
        for split, loss in published.items():
            assert result["scores"][split][int(k)] == pytest.approx(loss, abs=1e-5)
    assert set(result["scores"]["test"]) == ({1, 2, 3, 4} if golden.config["moe"] else {NO_EXPERTS})


def test_zero_stage_0_takes_the_same_steps(results: dict[str, Any]) -> None:
    plain, sharded = results["stage 0"]["steps"], results["hyperrouter_dynamic"]["steps"]
    for quantity, tolerance in TOLERANCES.items():
        expected = [step[quantity] for step in sharded]
        np.testing.assert_allclose([step[quantity] for step in plain], expected, atol=tolerance, rtol=0)
