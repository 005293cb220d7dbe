"""Held-out figures: the same on any number of ranks, whole or expert-parallel, and named honestly."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.config.schema import RouterConfig, RunConfig
from megamoe.errors import ConfigError
from megamoe.models.model_of import model_of
from megamoe.models.transformer_xl import ModelOutput, TransformerXL
from megamoe.parallel.launch import World, read_launch, start
from megamoe.training.evaluation import (
    NO_EXPERTS,
    Evaluation,
    best_k,
    evaluate,
    evaluation_span,
    in_metric,
    top_ks_to_score,
)
from tests.moe.policies import oracle_cases
from tests.ranks import run_ranks
from tests.training.runs import FP32, build_trainer, toy_corpus, toy_run

TOP_KS = (1, 2, 4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "all mixtures": {},
    "dense below": {"model": {"n_layers": 4}, "moe": {"layers": "2,3"}},
    "dense in between": {"model": {"n_layers": 3}, "moe": {"layers": "0,2"}},
    "pre-norm": {"model": {"n_layers": 3, "pre_norm": True}, "moe": {"layers": "1,2"}},
    "equal lengths": {"evaluation": {"same_length": True, "clamp_len": 5}},
    "no memory": {"evaluation": {"memory_len": 0}},
    "no mixtures": {"moe": {"layers": "none"}},
}
# Parts of a model whose layers 1 and 2 have experts, and what is called after each forward pass.
BELOW = ["embedding", "layers.0.attention", "layers.0.feed_forward", "layers.1.attention"]
ABOVE = ["layers.1.moe", "layers.2.attention", "layers.2.moe", "output", "after_segment"]
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def in_one_pass_and_separately(
    model: Callable[..., ModelOutput], run: RunConfig, world: World
) -> tuple[dict[int, float], dict[int, float]]:
    """Nats by k from one pass over the text, and from a pass for each k."""

    def nats(top_ks: tuple[int, ...]) -> dict[int, float]:
        return evaluate(model, toy_corpus(), "valid", top_ks, run, world).nats

    return nats(TOP_KS), {top_k: nats((top_k,))[top_k] for top_k in TOP_KS}


def evaluate_layouts_and_policies(folder: str) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """Both ways for every layout, and for every policy above a dense layer."""
    world = start(read_launch())
    runs = {name: toy_run(Path(folder), **changes) for name, changes in LAYOUTS.items()}
    above = toy_run(Path(folder), model={"n_layers": 3}, moe={"layers": "1,2"})
    for policy, options in oracle_cases():
        router = RouterConfig(name=policy, options=options)
        runs[f"{policy} {options}"] = replace(above, moe=replace(above.moe, router=router))
    vocab_size = toy_corpus().vocab_size
    result = {}
    for name, run in runs.items():
        model = model_of(replace(run, model=replace(run.model, vocab_size=vocab_size))).eval()
        result[name] = in_one_pass_and_separately(model, run, world)
    return result


def evaluate_partitioned(
    folder: str, world: World
) -> tuple[tuple[dict[int, float], dict[int, float]], Counter[str]]:
    """Both ways at ZeRO stage 3, and how often the lowest and the highest part were called."""
    run = toy_run(Path(folder), model={"n_layers": 3}, moe={"layers": "1,2", "ep_size": 1})
    engine = build_trainer(run, PARTITIONED, world, []).engine
    engine.eval()
    calls = Counter[str]()
    for part in (BELOW[0], ABOVE[-2]):
        count_calls_of(engine.model, part, calls)
    return in_one_pass_and_separately(engine.forward, run, world), calls


def count_calls_of(model: torch.nn.Module, part: str, calls: Counter[str]) -> None:
    model.get_submodule(part).register_forward_hook(lambda *_: calls.update([part]))


def evaluate_everywhere(folder: str) -> dict[str, Any]:
    """Figures of the same weights through the engine, and of a whole model on each rank."""
    world = start(read_launch())
    run, corpus = toy_run(folder), toy_corpus()
    trainer = build_trainer(run, FP32, world, [])
    trainer.engine.eval()
    sharded = evaluate(trainer.engine.forward, corpus, "valid", TOP_KS, run, world)
    by_engine = in_one_pass_and_separately(trainer.engine.forward, run, world)
    by_partitioned, calls = evaluate_partitioned(f"{folder}-partitioned", world)
    trainer.save([trainer.folder.best])
    trainer.wait_for_save()
    whole = load_model(trainer.folder.best)
    return {
        "sharded": sharded,
        "whole": evaluate(whole, corpus, "valid", TOP_KS, run, world),
        "one segment": evaluate(whole, corpus, "valid", TOP_KS, run, world, max_tokens=20),
        "both ways": [by_engine, by_partitioned],
        "calls at stage 3": calls,
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


def test_one_pass_on_several_ranks_gives_the_figures_of_a_pass_for_each_k(by_ranks):
    for ranks in by_ranks.values():
        for rank in ranks:
            for one_pass, separate in rank["both ways"]:
                assert one_pass == separate
                assert len(set(one_pass.values())) == len(TOP_KS)


def test_at_stage_3_every_forward_pass_calls_the_same_modules(by_ranks):
    for ranks in by_ranks.values():
        for rank in ranks:
            calls = rank["calls at stage 3"]
            assert calls[BELOW[0]] == calls[ABOVE[-2]] > 0


def test_one_pass_gives_the_figures_of_a_pass_for_each_k(tmp_path):
    (found,) = run_ranks(evaluate_layouts_and_policies, 1, str(tmp_path))
    assert {name for name, (one_pass, separate) in found.items() if one_pass != separate} == set()
    differing = [len(set(one_pass.values())) for one_pass, _ in found.values()]
    assert differing[: len(LAYOUTS)] == [len(TOP_KS)] * (len(LAYOUTS) - 1) + [1]
    assert all(math.isfinite(nats) for one_pass, _ in found.values() for nats in one_pass.values())


def test_what_is_below_the_experts_is_computed_once_for_all_k(tmp_path):
    (calls,) = run_ranks(count_calls, 1, str(tmp_path))
    segments = calls["embedding"]
    assert segments > 3
    assert calls == dict.fromkeys(BELOW, segments) | dict.fromkeys(ABOVE, 3 * segments)


def count_calls(folder: str) -> dict[str, int]:
    """How often each part of a model with a dense layer below the mixtures runs in one evaluation."""
    world, calls = start(read_launch()), Counter[str]()
    sizes = {"n_layers": 3, "vocab_size": toy_corpus().vocab_size}
    run = toy_run(Path(folder), model=sizes, moe={"layers": "1,2"})
    model = model_of(run).eval()
    for part in BELOW + ABOVE[:-1]:
        count_calls_of(model, part, calls)
    evaluate(
        model, toy_corpus(), "valid", TOP_KS, run, world, after_segment=lambda: calls.update([ABOVE[-1]])
    )
    return dict(calls)


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
