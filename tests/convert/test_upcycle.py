from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.convert import upcycle
from megamoe.convert.neutral import open_neutral
from megamoe.errors import CheckpointError, ConfigError
from tests.checkpoint.small import model_of, write_model
from tests.convert.dense import require_same_function, weights, write_dense
from tools.convert_checkpoint import main


@pytest.mark.parametrize(
    ("options", "n_experts", "top_k"),
    [
        (["--n-experts", "4"], 4, 2),
        (["--n-experts", "4", "--top-k", "1", "--router", "smoe_dropout"], 4, 1),
        (["--n-experts", "3", "--top-k", "3", "--router", "smoe", "--layers", "1"], 3, 3),
        (["--n-experts", "4", "--router", "smoe", "--granularity", "3", "--top-k", "3"], 12, 3),
        (["--n-experts", "4", "--router", "smoe", "--granularity", "4", "--top-k", "8"], 16, 8),
    ],
)  # fmt: skip
def test_an_upcycled_model_computes_what_the_dense_one_did(
    tmp_path: Path, options: list[str], n_experts: int, top_k: int
) -> None:
    dense = write_dense(tmp_path / "dense")
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *options]) == 0
    CheckpointReader(tmp_path / "moe").verify()
    model = load_model(tmp_path / "moe")
    moe = model.moe_config
    assert (moe.n_experts, moe.top_k) == (n_experts, top_k)
    assert model.moe_layers
    require_same_function(model, dense)


def test_the_shards_of_a_copy_are_chosen_together(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    options = ["--n-experts", "4", "--granularity", "2", "--router", "smoe", "--top-k", "4"]
    main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *options])
    routing = load_model(tmp_path / "moe")(torch.arange(12).view(2, 6)).routings[0]
    copies_TK = (routing.expert_ids_TK // 2).sort(dim=1).values
    assert torch.equal(copies_TK[:, 0::2], copies_TK[:, 1::2])
    assert len(copies_TK.unique(dim=0)) > 1


def test_an_upcycled_run_starts_anew_with_the_old_text(tmp_path: Path) -> None:
    config, model = model_of(moe={"layers": "none"})
    write_model(tmp_path / "dense", config, model, step=40, tokenizer={"kind": "bytes"}, best_metric=1.0)
    main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--n-experts", "2"])
    tensors, converted, state = open_neutral(tmp_path / "moe")
    assert (state.step, state.best_metric, state.tokenizer) == (0, None, {"kind": "bytes"})
    assert {tensor.kind for tensor in tensors} == {"weight", "buffer"}
    assert converted.model == config.model
    experts = weights(tmp_path / "moe")["layers.0.moe.experts.w_in"]
    assert torch.equal(experts, model.layers[0].feed_forward.w_in.expand(2, -1, -1))


def test_one_expert_per_token_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dense(tmp_path / "dense")
    main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "a"), "--n-experts", "2", "--top-k", "1"])
    assert "router gets no gradient" in capsys.readouterr().err
    main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "b"), "--n-experts", "2"])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_copies": 0, "top_k": 1}, "--n-experts = 0: give"),
        ({"n_copies": 2, "top_k": 3}, "moe.top_k = 3: stay at or below moe.n_experts = 2"),
        ({"n_copies": 2, "top_k": 5, "granularity": 5, "router": "smoe"}, "divisor of model.d_inner = 24"),
        ({"n_copies": 2, "top_k": 3, "granularity": 2, "router": "smoe"}, "--top-k = 3: give a multiple"),
        ({"n_copies": 2, "top_k": 2, "granularity": 2, "router": "hyper"}, "choose smoe"),
        ({"n_copies": 2, "top_k": 2, "layers": "5"}, "moe.layers"),
    ],
)  # fmt: skip
def test_settings_that_would_not_keep_the_function_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    dense, _ = model_of(moe={"layers": "none"})
    with pytest.raises((CheckpointError, ConfigError), match=message):
        upcycle.upcycled_config(dense, **settings)


def test_a_checkpoint_with_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has mixture layers; start from a dense one"):
        upcycle.upcycled_config(model_of()[0], 2, 2)
