"""Recording, and a predictor that learns what can be learnt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe.config import from_dict
from megamoe.data.stream import TokenStream
from megamoe.errors import CheckpointError, DataError
from megamoe.models.attention import AttentionSpan
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.predictor import Predictor, PredictorShape
from megamoe.serve.predictor_file import DESCRIPTION, WEIGHTS, load_predictor, save_predictor
from megamoe.serve.predictor_training import distillation_loss, train_predictor
from megamoe.serve.recall import mean_recall, recalls
from megamoe.serve.recording import RoutingRecords, record_routings, segment_file
from tests.checkpoint.runs import RUN, VOCAB_SIZE

SPAN = AttentionSpan(14, same_length=True)
N_SEGMENTS = 20


def model_of(router: str, seed: int = 1) -> TransformerXL:
    config = from_dict(
        RUN | {"moe": RUN["moe"] | {"layers": "all", "n_experts": 8, "router": {"name": router}}}
    )
    return TransformerXL(replace(config.model, vocab_size=VOCAB_SIZE), config.moe, seed=seed).eval()


def text(n_rows: int = 4, n: int = 6 * N_SEGMENTS + 1) -> TokenStream:
    ids = torch.randint(VOCAB_SIZE, (n_rows * n,), generator=torch.Generator().manual_seed(3))
    return TokenStream(ids.numpy(), batch_size=n_rows, segment_len=6)


def record(model: TransformerXL, folder: Path, stream: TokenStream | None = None) -> RoutingRecords:
    folder.mkdir()
    how = {"n_segments": N_SEGMENTS, "top_k": 2, "step": 1, "span": SPAN}
    return record_routings(model, stream or text(), folder, **how)


def test_a_segment_holds_what_the_model_did(tmp_path: Path) -> None:
    model, stream = model_of("smoe"), text()
    record(model, tmp_path / "routings")
    records = RoutingRecords.open(tmp_path / "routings")
    assert (records.layers, records.n_experts) == (("layers.0.moe", "layers.1.moe"), 8)
    memory = None
    for number in range(3):
        batch, segment = stream.batch(number), records.segment(number)
        output = model(batch.input_ids_BS, memory=memory, top_k=2, step=1, span=SPAN)
        memory = output.memory
        assert torch.equal(segment.token_ids_BS.long(), batch.input_ids_BS)
        assert segment.resets_B.tolist() == [number == 0] * 4
        for layer, routing in enumerate(output.routings):
            assert torch.equal(segment.expert_ids_BSK[layer].flatten(0, 1).long(), routing.expert_ids_TK)
            assert torch.equal(segment.top_ids_BST[layer][..., :2], segment.expert_ids_BSK[layer])
            assert routing.logits_TE is not None
            top = routing.logits_TE.topk(8).values.half()
            assert torch.equal(segment.top_logits_BST[layer].flatten(0, 1), top)


def test_refusals_of_records(tmp_path: Path) -> None:
    folder = tmp_path / "routings"
    records = record(model_of("smoe"), folder)
    good = load_file(segment_file(folder, 0))
    for changes in (
        {"top_ids.1": good["top_ids.1"][:, :-1].contiguous()},
        {"expert_ids.0": good["expert_ids.0"] + 8},
        {"resets": good["resets"][:-1].contiguous()},
    ):
        save_file(good | changes, segment_file(folder, 0))
        with pytest.raises(DataError, match="its parts are not of the same tokens"):
            records.segment(0)
    del good["top_logits.0"]
    save_file(good, segment_file(folder, 0))
    with pytest.raises(DataError, match=r"lacks 'top_logits.0'"):
        records.segment(0)
    segment_file(folder, 1).write_bytes(b"\0" * 30)
    with pytest.raises(DataError, match="cannot be read"):
        records.segment(1)
    (folder / "routings.json").write_text("[]")
    with pytest.raises(DataError, match=r"routings.json: cannot be read"):
        RoutingRecords.open(folder)


def test_the_loss_is_least_where_the_scores_are_the_teachers(tmp_path: Path) -> None:
    segment = record(model_of("smoe"), tmp_path / "routings").segment(0)
    teacher_BSLE = torch.stack(
        [
            torch.zeros(4, 6, 8).scatter(-1, ids.long(), logits.float())
            for ids, logits in zip(segment.top_ids_BST, segment.top_logits_BST, strict=True)
        ],
        dim=2,
    )
    least = distillation_loss(teacher_BSLE, segment)
    p_BSLE = teacher_BSLE.softmax(-1)
    first = torch.stack(
        [p_BSLE[:, :, n].gather(-1, ids[..., :1].long()) for n, ids in enumerate(segment.expert_ids_BSK)]
    )
    torch.testing.assert_close(least, -0.005 * first.log().mean(), atol=1e-5, rtol=0)
    noise = torch.randn(teacher_BSLE.shape, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(teacher_BSLE + 0.5 * noise, segment) > least + 0.02


def test_it_learns_a_routing_that_the_text_decides(tmp_path: Path) -> None:
    model = model_of("hash")
    model.embedding.weights[0].data.mul_(20)  # as large as trained ones
    records = record(model, tmp_path / "routings", text(n_rows=32))
    torch.manual_seed(0)
    predictor = Predictor(PredictorShape(d_model=16, n_layers=2, n_experts=8, width=32, context=8))
    fit = train_predictor(predictor, model.embedding, records, epochs=60)
    assert mean_recall(fit.recalls, 1) > 0.4
    assert mean_recall(fit.recalls, 2) > 0.9
    assert mean_recall(fit.frequent, 2) < 0.6
    assert mean_recall(fit.previous, 2) < 0.6
    assert fit.epochs <= 60
    assert fit.tokens == 2 * 32 * 6


def test_recall_by_hand(tmp_path: Path) -> None:
    records = record(model_of("smoe"), tmp_path / "routings")
    found = recalls(
        lambda s: torch.arange(8.0).expand(*s.token_ids_BS.shape, 2, 8), records, [0, 1], [1, 3, 8]
    )
    for layer in range(2):
        ids = torch.cat([records.segment(n).expert_ids_BSK[layer] for n in (0, 1)])
        for m in (1, 3, 8):
            assert found[layer][m] == pytest.approx((ids >= 8 - m).float().mean().item())


def test_a_predictor_belongs_to_one_checkpoint(tmp_path: Path) -> None:
    model = model_of("smoe")
    predictor = Predictor(PredictorShape(d_model=16, n_layers=2, n_experts=8, width=4))
    save_predictor(predictor, tmp_path, model, {})
    loaded = load_predictor(tmp_path, model)
    for ours, theirs in zip(loaded.parameters(), predictor.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match=r"belongs to another checkpoint; run megamoe predict-experts"):
        load_predictor(tmp_path, model_of("smoe", seed=2))
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 9)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(tmp_path, model)
    values = json.loads((tmp_path / DESCRIPTION).read_text())
    save_predictor(
        Predictor(PredictorShape(d_model=16, n_layers=1, n_experts=8, width=4)), tmp_path, model, {}
    )
    with pytest.raises(CheckpointError, match=r"but the model has D, L, E = \(16, 2, 8\)"):
        load_predictor(tmp_path, model)
    (tmp_path / DESCRIPTION).write_text(json.dumps(values | {"shape": {"width": 1}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(tmp_path, model)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(tmp_path / "none", model)
