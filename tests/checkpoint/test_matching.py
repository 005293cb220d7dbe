from dataclasses import replace

import pytest

from megamoe.checkpoint.matching import require_same_options, require_same_tensors
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.config.schema import RouterConfig
from megamoe.errors import CheckpointError
from tests.checkpoint.small import model_of, write_model


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return CheckpointReader(write_model(tmp_path_factory.mktemp("run") / "best", *model_of()))


@pytest.mark.parametrize(
    ("updates", "here", "there"),
    [
        ({"model": {"d_model": 32}}, "model.d_model = 32", "16; set model.d_model=16"),
        ({"model": {"n_heads": 1, "d_head": 16}}, "model.n_heads = 1", "2; set model.n_heads=2"),
        ({"model": {"pre_norm": True}}, "model.pre_norm = True", "False; set model.pre_norm=false"),
        ({"moe": {"layers": "all"}}, "moe.layers = (0, 1)", "(1,); set moe.layers=1"),
        ({"moe": {"n_experts": 2}}, "moe.n_experts = 2", "4; set moe.n_experts=4"),
    ],
)
def test_the_first_option_that_differs_is_named(reader, updates, here, there):
    config, _ = model_of(**updates)
    with pytest.raises(CheckpointError) as caught:
        require_same_options(reader, config.model, config.moe)
    message = str(caught.value).replace(str(reader.folder), "FOLDER")
    assert message == f"{here}: checkpoint 'FOLDER' was trained with {there} or choose another checkpoint"


def test_another_policy_is_refused_even_where_shapes_agree(reader):
    config, _ = model_of()
    moe = replace(config.moe, router=RouterConfig(name="smoe"))
    with pytest.raises(CheckpointError, match=r"moe\.router\.name = 'smoe': .* set moe\.router\.name=hyper"):
        require_same_options(reader, config.model, moe)


def test_layers_are_compared_by_what_they_mean(reader):
    config, _ = model_of()
    require_same_options(reader, config.model, replace(config.moe, layers="1,1"))


def test_the_option_of_the_router_that_changes_a_shape_is_named(reader):
    _, model = model_of(moe={"router": {"hyper_size": 9}})
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(reader, model)
    message = str(caught.value).replace(str(reader.folder), "FOLDER")
    assert message == (
        "moe.router.hyper_size = 9: checkpoint 'FOLDER' was trained with 8; set moe.router.hyper_size=8"
        " or choose another checkpoint (layers.1.moe.router.hypernet_w_in: [9, 16] in the model,"
        " [8, 16] in checkpoint 'FOLDER')"
    )


def test_a_tensor_more_or_less_is_named(reader):
    _, larger = model_of(model={"n_layers": 3})
    with pytest.raises(CheckpointError, match=r"layers\.2\..*: not in checkpoint"):
        require_same_tensors(reader, larger)
    _, smaller = model_of()
    del smaller.layers[0]
    smaller.layers.insert(0, smaller.layers[0])
    with pytest.raises(CheckpointError, match="but the model has"):
        require_same_tensors(reader, smaller)


def test_what_may_change_on_the_way_is_accepted(reader):
    config, model = model_of(
        model={"dropout": 0.3, "memory_len": 3, "segment_len": 2}, moe={"top_k": 1, "balance_loss": 0.1}
    )
    require_same_options(reader, config.model, config.moe)
    require_same_tensors(reader, model)
