"""Sentences scored at every k: each once, whatever the batches and the ranks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.config.schema import EvaluationConfig, MoEConfig, RunConfig
from megamoe.data.overlap import Overlap, fingerprints
from megamoe.data.sentences import Sentences, SentenceSet
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.models.classifier import Classifier
from megamoe.parallel.launch import World, read_launch, start
from megamoe.training.accuracy import Accuracy, evaluate_sentences, wilson_interval
from tests.models.builders import VOCABULARY, small_config
from tests.ranks import run_ranks

BATCH_SIZES = (1, 3, 4, 11, 20)
MOE = MoEConfig(layers="1", n_experts=4, d_expert=10, top_k=2)


def sentences() -> SentenceSet:
    generator = np.random.default_rng(1)
    ids = [generator.integers(0, VOCABULARY, generator.integers(1, 9)) for _ in range(11)]
    split = Sentences(ids, generator.integers(0, 3, 11), 0)
    return SentenceSet(
        "toy sentences", ("a", "b", "c"), True, "", ByteTokenizer(), {"test": split}, fingerprints([]),
        {"test": Overlap(1, 11)},
    )  # fmt: skip


def classifier() -> Classifier:
    return Classifier(small_config(), MOE, n_classes=3, seed=5).double().eval()


def run(batch_size: int, memory_len: int) -> RunConfig:
    scoring = EvaluationConfig(batch_size=batch_size, memory_len=memory_len)
    return RunConfig(model=small_config(), moe=MOE, evaluation=scoring)


def score(world: World, batch_size: int, memory_len: int = 0, top_ks: tuple[int, ...] = (2, 4)) -> Accuracy:
    return evaluate_sentences(classifier(), sentences(), "test", top_ks, run(batch_size, memory_len), world)


def one_by_one() -> tuple[dict[int, int], dict[int, float]]:
    model, split = classifier(), sentences().splits["test"]
    correct, nats = {}, {}
    for top_k in (2, 4):
        outputs = [
            model(torch.from_numpy(ids)[None], torch.zeros(1, len(ids), dtype=torch.bool), label, top_k=top_k)
            for ids, label in zip(split.ids, torch.from_numpy(split.labels)[:, None], strict=True)
        ]
        guesses = [int(output.logits_BC.argmax()) for output in outputs]
        correct[top_k] = sum(a == b for a, b in zip(guesses, split.labels.tolist(), strict=True))
        nats[top_k] = float(np.mean([output.loss_B.item() for output in outputs]))
    return correct, nats


def score_all(_: Any) -> list[tuple[dict[int, int], dict[int, float], int]]:
    world = start(read_launch())
    scored = [score(world, batch_size) for batch_size in BATCH_SIZES]
    scored += [score(world, 4, memory_len=6, top_ks=top_ks) for top_ks in ((2, 4), (2,), (4,))]
    return [(accuracy.correct, accuracy.nats, accuracy.tokens) for accuracy in scored]


@pytest.fixture(scope="module")
def scored() -> dict[int, list[Any]]:
    return {n_ranks: run_ranks(score_all, n_ranks, None) for n_ranks in (1, 2)}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_each_sentence_is_scored_once(scored: dict[int, list[Any]], n_ranks: int) -> None:
    correct, nats = one_by_one()
    for rank in scored[n_ranks]:
        for found_correct, found_nats, n in rank[: len(BATCH_SIZES)]:
            assert n == 11
            assert found_correct == correct
            assert found_nats == pytest.approx(nats, abs=1e-6)


def test_memory_is_that_of_the_batch_before_on_any_number_of_ranks(scored: dict[int, list[Any]]) -> None:
    correct, nats, _ = scored[1][0][len(BATCH_SIZES)]
    for rank in scored[2]:
        assert rank[len(BATCH_SIZES)][0] == correct
        assert rank[len(BATCH_SIZES)][1] == pytest.approx(nats, abs=1e-6)
    assert nats != pytest.approx(one_by_one()[1], abs=1e-6)


def test_one_pass_gives_the_figures_of_a_pass_for_each_k(scored: dict[int, list[Any]]) -> None:
    for rank in (*scored[1], *scored[2]):
        together, alone_2, alone_4 = rank[len(BATCH_SIZES) :]
        assert together[0] == alone_2[0] | alone_4[0]
        assert together[1] == alone_2[1] | alone_4[1]


def test_wilson_interval() -> None:
    """Newcombe, Statistics in Medicine 1998, table I."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_figures_and_what_decides() -> None:
    found = Accuracy(
        corpus="toy", split="valid", metric="accuracy", tokens=10, nats={2: 0.5, 4: 0.4},
        correct={2: 9, 4: 7}, n_classes=2, overlap=1,
    )  # fmt: skip
    assert found.selection(4) == pytest.approx(0.3)
    assert found.metrics() == {
        "valid/loss_k2": 0.5, "valid/accuracy_k2": 0.9, "valid/loss_k4": 0.4, "valid/accuracy_k4": 0.7,
    }  # fmt: skip
    assert found.cells(2)["accuracy"] == "90.00 %"
    assert found.to_dict()["also_in_training"] == 1
    dense = replace(found, nats={0: 0.5}, correct={0: 9})
    assert dense.metrics() == {"valid/loss": 0.5, "valid/accuracy": 0.9}
