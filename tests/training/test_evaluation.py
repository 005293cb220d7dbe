"""Held-out figures: the same on any number of ranks, whole or expert-parallel, and named honestly."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.parallel.launch import read_launch, start
from megamoe.training.evaluation import (
    NO_EXPERTS,
    Evaluation,
    best_k,
    evaluate,
    evaluation_span,
    in_metric,
    top_ks_to_score,
)
from tests.ranks import run_ranks
from tests.training.runs import FP32, build_trainer, toy_corpus, toy_run

TOP_KS = (1, 2, 4)


def evaluate_everywhere(folder: str) -> dict[str, Any]:
    """Figures of the same weights through the engine, and of a whole model on each rank."""
    world = start(read_launch())
    run, corpus = toy_run(folder), toy_corpus()
    trainer = build_trainer(run, FP32, world, [])
    trainer.engine.eval()
    sharded = evaluate(trainer.engine.forward, corpus, "valid", TOP_KS, run, world)
    trainer.save([trainer.folder.best])
    trainer.wait_for_save()
    whole = load_model(trainer.folder.best)
    return {
        "sharded": sharded,
        "whole": evaluate(whole, corpus, "valid", TOP_KS, run, world),
        "one segment": evaluate(whole, corpus, "valid", TOP_KS, run, world, max_tokens=20),
    }


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    return {size: run_ranks(evaluate_everywhere, size, str(folder / str(size))) for size in (1, 2, 4)}


def score_by_hand(model: TransformerXL, run: RunConfig, n_segments: int) -> tuple[float, int]:
    """Nats per token at k = 2, one stream after the other, one segment after the other."""
    tokens = torch.from_numpy(toy_corpus().tokens["valid"]).long()
    n_rows, length = run.evaluation.batch_size, run.evaluation.segment_len
    total, count = 0.0, 0
    for row in tokens[: len(tokens) // n_rows * n_rows].view(n_rows, -1):
        memory = None
        for start_at in list(range(0, len(row) - 1, length))[:n_segments]:
            stop = min(start_at + length, len(row) - 1)
            output = model(
                row[None, start_at:stop], row[None, start_at + 1 : stop + 1], memory,
                top_k=2, span=evaluation_span(run),
            )  # fmt: skip
            memory = output.memory
            total += output.loss_BS.double().sum().item()
            count += stop - start_at
    return total / count, count


@pytest.mark.parametrize("form", ["sharded", "whole", "one segment"])
def test_figures_do_not_depend_on_the_number_of_ranks(by_ranks, form):
    # Three streams: two ranks share them unevenly, and of four ranks the last has none.
    alone = by_ranks[1][0][form]
    for size, ranks in by_ranks.items():
        assert all(rank[form] == ranks[0][form] for rank in ranks), size
        assert ranks[0][form].tokens == alone.tokens
        assert ranks[0][form].nats == pytest.approx(alone.nats, abs=1e-6)
    assert len(set(alone.nats.values())) == len(TOP_KS)


def test_figures_are_means_over_every_token(by_ranks, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    best = next(folder.glob("evaluation*/1/toy/best"))
    model, run = load_model(best), toy_run(best)
    with torch.no_grad():
        for form, n_segments in (("whole", 1000), ("one segment", 1)):
            nats, count = score_by_hand(model, run, n_segments)
            assert by_ranks[1][0][form].nats[2] == pytest.approx(nats, abs=1e-6)
            assert by_ranks[1][0][form].tokens == count


def test_the_engine_and_the_loaded_model_agree(by_ranks):
    for ranks in by_ranks.values():
        assert ranks[0]["sharded"].nats == pytest.approx(ranks[0]["whole"].nats, abs=1e-6)


def test_memory_keeps_the_span_of_training_by_default(tmp_path):
    run = toy_run(tmp_path)  # segments of 6 and memory 8 in training, segments of 4 here
    assert evaluation_span(run).memory_len == 8 + 6 - 4
    asked = toy_run(tmp_path, evaluation={"memory_len": 3, "clamp_len": 5, "same_length": True})
    assert evaluation_span(asked) == type(evaluation_span(run))(3, same_length=True, clamp_len=5)
    assert evaluation_span(toy_run(tmp_path, evaluation={"segment_len": 99})).memory_len == 0


def test_only_runnable_k_are_scored(tmp_path):
    run = toy_run(tmp_path)
    assert top_ks_to_score(run, (64, 4, 1, 4)) == (1, 4)
    with pytest.raises(
        ConfigError, match=r"^evaluation.top_ks = \(8, 16\): name a k up to moe.n_experts = 4$"
    ):
        top_ks_to_score(run, (8, 16))
    without = toy_run(tmp_path, moe={"layers": "none"})
    assert top_ks_to_score(without, (1, 2)) == (NO_EXPERTS,)
    dense = toy_run(tmp_path, moe={"router": {"name": "dense"}})
    assert top_ks_to_score(dense, (1, 2)) == (4,)


def test_what_is_best_is_decided_at_the_k_of_training(tmp_path):
    def found(asked: int | str = "auto", **moe: Any) -> int:
        return best_k(toy_run(tmp_path, evaluation={"best_k": asked}, moe=moe))

    constant = {"schedule": {"mode": "constant"}}
    assert (found(), found(**constant), found(3, **constant)) == (4, 2, 3)
    assert found(**constant, router={"name": "switch"}) == 1
    assert found(layers="none") == NO_EXPERTS
    with pytest.raises(ConfigError, match=r"^evaluation.best_k = 5: name a k up to moe.n_experts = 4$"):
        found(5)
    with pytest.raises(ConfigError, match=r"^evaluation.best_k = 0: "):
        found(0)


def test_units():
    assert in_metric(math.log(2), "bpc") == 1
    assert in_metric(math.log(50), "ppl") == pytest.approx(50)
    assert in_metric(1e6, "ppl") == math.inf


def test_subwords_also_report_perplexity_per_word():
    nats = {2: 3.0, 4: 2.5}
    evaluation = Evaluation("WikiText-2 (8192 subwords)", "test", "ppl", 10, nats, words_per_token=0.5)
    assert evaluation.figure(4) == pytest.approx(np.exp(2.5))
    assert evaluation.word_perplexity(4) == pytest.approx(np.exp(2.5 / 0.5))
    assert evaluation.metrics()["test/word_ppl_k2"] == pytest.approx(np.exp(6.0))
    written = evaluation.to_dict()
    assert (written["words_per_token"], written["word_ppl_by_k"]["4"]) == (0.5, pytest.approx(np.exp(5.0)))


def test_names_of_metrics():
    scored = Evaluation("text", "valid", "bpc", 10, {1: math.log(2), 2: math.log(4)})
    expected = {
        "valid/loss_k1": math.log(2),
        "valid/bpc_k1": 1.0,
        "valid/loss_k2": math.log(4),
        "valid/bpc_k2": 2.0,
    }
    assert scored.metrics() == pytest.approx(expected)
    dense = Evaluation("text", "valid", "bpc", 10, {NO_EXPERTS: math.log(2)})
    assert dense.metrics() == {"valid/loss": math.log(2), "valid/bpc": 1.0}
