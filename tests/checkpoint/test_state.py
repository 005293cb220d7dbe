import json

import pytest

from megamoe.checkpoint.state import EngineCounters, TrainingState
from megamoe.errors import CheckpointError

STATE = TrainingState(
    step=400,
    tokens_seen=10**12,
    best_metric=1.25,
    best_step=200,
    schedule={"factor": 0.5, "best": 0.7, "waited": 1},
    corpus={"name": "enwik8-sample (true bytes)", "is_sample": True},
    tokenizer={"kind": "bytes"},
    engine=EngineCounters(global_steps=400, optimizer_step=399, loss_scaler={"cur_scale": 65536.0}),
)


def changed(**changes):
    return json.dumps(json.loads(STATE.to_json()) | changes)


def test_text_gives_the_same_state_back():
    assert TrainingState.from_json(STATE.to_json()) == STATE


def test_a_young_run_has_no_best():
    assert TrainingState.from_json('{"step": 0}') == TrainingState(step=0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "step: missing"),
        (changed(stap=3), "stap: unknown field"),
        (changed(step="3"), "step = '3': expected int"),
        (changed(step=3.0), "step = 3.0: expected int"),
        (changed(step=True), "step = True: expected int"),
        (changed(step=None), "step = None: expected int"),
        (changed(best_metric="low"), "best_metric = 'low': expected float or NoneType or int"),
        (changed(tokenizer=[]), "tokenizer = \\[\\]: expected dict"),
        (changed(engine=3), "engine = 3: expected EngineCounters"),
        (changed(engine={"global_steps": 1.5}), "engine.global_steps = 1.5: expected int"),
        (changed(engine={"steps": 1}), "engine.steps: unknown field"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_wrong_fields_are_named(text, problem):
    with pytest.raises(CheckpointError, match=problem):
        TrainingState.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(CheckpointError, match="cannot be written"):
        TrainingState(step=1, schedule={"factor": value}).to_json()
