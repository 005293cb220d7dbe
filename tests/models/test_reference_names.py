import pytest
import torch

from megamoe.errors import CheckpointError
from megamoe.models.reference_names import from_reference, optimizer_order, to_reference
from tests.models.builders import small_config, small_model
from tests.models.goldens import Golden

VARIANTS = [
    {},
    {"tie_weights": False},
    {"cutoffs": (4, 10), "d_embed": 6, "tie_projections": True},
    {"cutoffs": (4, 10), "div_val": 2},
    {"cutoffs": (4, 10), "div_val": 2, "tie_weights": False, "tie_projections": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_there_and_back_again(changes: dict[str, object]) -> None:
    model = small_model(moe_layers="0", **changes)
    state = model.state_dict()
    back = from_reference(to_reference(state, model.model_config), model.model_config)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_tied_tensors_are_listed_twice_there() -> None:
    config = small_config(cutoffs=(4, 10), div_val=2, tie_projections=True)
    model = small_model(cutoffs=(4, 10), div_val=2, tie_projections=True)
    state = to_reference(model.state_dict(), config)
    assert state["crit.out_layers.2.weight"] is state["word_emb.emb_layers.2.weight"]
    assert state["crit.out_projs.1"] is state["word_emb.emb_projs.1"]
    assert state["crit.out_projs.0"] is not state["word_emb.emb_projs.0"]
    assert state["layers.0.pos_ff.gate.embedding"].shape == (1, 8)


def test_refuses_weights_that_should_be_tied_but_differ() -> None:
    untied = to_reference(small_model(tie_weights=False).state_dict(), small_config(tie_weights=False))
    with pytest.raises(CheckpointError, match=r"'crit.out_layers.0.weight': differs from 'word_emb"):
        from_reference(untied, small_config())


def test_refuses_tensors_without_a_counterpart() -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'project_head.0.weight': has no counterpart"):
        from_reference({"project_head.0.weight": torch.zeros(1)}, small_config())


@pytest.mark.parametrize("name", ["adaptive_hyper", "mixed_tiny", "smoe_untied", "dense_tiny"])
def test_optimizer_order(name: str) -> None:
    golden = Golden("forward", name)
    k = golden.config["grad_k"][0]
    published = list(golden.group(f"k{k}/grad/"))
    assert optimizer_order(sorted(published)) == published
