"""Modes of serving, measured in this process, and what the report makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import megamoe
from megamoe.models.attention import AttentionSpan
from megamoe.serve.budget import Budget
from megamoe.serve.measurement import HINT, MODES, ON_DEMAND, ORACLE, REPLACE, RESIDENT, Task, measure
from megamoe.serve.predictor import Predictor, PredictorShape
from megamoe.serve.predictor_file import save_predictor
from megamoe.serve.prefetch import rank_experts
from megamoe.serve.workload import Reading, read_aloud
from tests.serve.models import write_language_model

IDS = np.random.default_rng(3).integers(0, 32, 40).astype(np.uint8)
SPAN = AttentionSpan(14, same_length=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = {"layers": "all", "n_experts": 6}
    return write_language_model(tmp_path_factory.mktemp("run") / "best", moe=moe)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = PredictorShape(d_model=16, n_layers=2, n_experts=6, width=8, context=4)
    saved = folder.parent / "predictor"
    saved.mkdir()
    save_predictor(Predictor(shape), saved, megamoe.load_model(folder), {})
    return saved


@pytest.mark.parametrize("at_once", [1, 7])
def test_only_replacement_changes_what_the_model_says(folder: Path, predictor: Path, at_once: int) -> None:
    reading = Reading(at_once, 2, 1, SPAN)
    calls, found = (), {}
    for mode in MODES:
        budget = None if mode == RESIDENT else Budget.parse("50%")
        task = Task(
            checkpoint=folder, ids_N=IDS, reading=reading, mode=mode, budget=budget,
            predictor=predictor, calls=calls,
        )  # fmt: skip
        found[mode] = measure(task)
        if mode == ON_DEMAND:
            calls = found[mode].calls
    for mode in (ON_DEMAND, HINT, ORACLE):
        assert found[mode].losses_sha256 == found[RESIDENT].losses_sha256
        assert found[mode].traffic["hits"] + found[mode].traffic["late"] + found[mode].traffic[
            "misses"
        ] == sum(len(needed) for of_layer in calls for needed in of_layer)
    assert found[REPLACE].losses_sha256 != found[RESIDENT].losses_sha256
    assert [len(of_layer) for of_layer in calls] == [-(-39 // at_once)] * 2
    for mode, measured in found.items():
        assert measured.slot_bytes == found[RESIDENT].slot_bytes // (1 if mode == RESIDENT else 2)
        assert measured.peak_bytes > 1 << 20


def test_pieces_of_a_text_score_alike(folder: Path) -> None:
    model, ids_N = megamoe.load_model(folder), torch.from_numpy(IDS.astype(np.int64))
    one, many = (read_aloud(model, ids_N, Reading(at_once, 2, 1, SPAN)) for at_once in (1, 7))
    assert one.shape == (39,)
    torch.testing.assert_close(one, many)


def test_pieces_are_announced_in_time(folder: Path) -> None:
    ids_N, model = torch.from_numpy(IDS.astype(np.int64)), megamoe.load_model(folder)
    for at_once, ahead in ((1, 0), (8, 1)):
        events = []
        model.register_forward_pre_hook(lambda *_, events=events: events.append("read"))
        read_aloud(model, ids_N, Reading(at_once, 2, 1, SPAN), lambda ids_1S, e=events: e.append(ids_1S))
        announced = torch.cat([event for event in events if not isinstance(event, str)], dim=1)
        assert torch.equal(announced[0], ids_N[:-1])
        if ahead:
            kinds = ["read" if isinstance(event, str) else "announced" for event in events]
            assert kinds == ["announced"] + ["announced", "read"] * 4 + ["read"]


def test_experts_are_ranked_by_how_much_they_are_wanted() -> None:
    logits_TE = torch.tensor([[4.0, 3.0, 0.0, 0.0], [0.0, 4.0, 3.9, -9.0]])
    assert rank_experts(logits_TE, 2) == [1, 0, 2]
    assert rank_experts(logits_TE, 1) == [0, 1]
    assert sorted(rank_experts(logits_TE, 9)) == [0, 1, 2, 3]
