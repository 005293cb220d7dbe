"""The classifier against the published one, and what padding must not do."""

import pytest
import torch
from torch.testing import assert_close

from megamoe.config.schema import MoEConfig
from megamoe.models.classifier import Classifier, ClassifierOutput
from megamoe.models.reference_names import from_reference
from tests.models.builders import VOCABULARY, small_config
from tests.models.goldens import Golden, golden_names

CASES = [
    pytest.param(name, k, id=f"{name}-k{k}")
    for name in golden_names("sst2")
    for k in Golden("sst2", name).config["k_list"]
]


OUR_HEAD = {"project_head.0": "head.hidden", "project_head.3": "head.output"}


def ours(golden: Golden, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix` under our names."""
    published = golden.group(prefix)
    head = {
        f"{ours}.{kind}": published.pop(f"{theirs}.{kind}")
        for theirs, ours in OUR_HEAD.items()
        for kind in ("weight", "bias")
    }
    return from_reference(published, golden.model_config) | head


def classifier(golden: Golden) -> Classifier:
    """The published classifier; its language model's output layer, which does nothing, is left out."""
    state = ours(golden, "param/")
    model = Classifier(golden.model_config, golden.moe_config, n_classes=2, seed=0)
    model.load_state_dict({name: state[name] for name in state if not name.startswith("output.")})
    return model


def run(model: Classifier, golden: Golden, k: int) -> list[ClassifierOutput]:
    outputs: list[ClassifierOutput] = []
    memory, memory_padding = None, None
    for i in range(golden.facts["batches"]):
        # The diagonal of the published mask hides padding alone.
        padding_BS = golden.arrays[f"mask{i}"].bool().diagonal(dim1=0, dim2=1)
        output = model(
            golden.arrays[f"tokens{i}"].long().t(), padding_BS, golden.arrays[f"label{i}"].long(),
            memory, memory_padding, top_k=k or None,
        )  # fmt: skip
        memory, memory_padding = output.memory, output.memory_padding_BM
        outputs.append(output)
    return outputs


@pytest.mark.parametrize(("name", "k"), CASES)
def test_published_numbers(name: str, k: int) -> None:
    golden = Golden("sst2", name)
    model = classifier(golden)
    hypernets = {key: buffer.requires_grad_() for key, buffer in model.named_buffers()}
    outputs = run(model, golden, k)
    for i, output in enumerate(outputs):
        assert output.loss_B is not None
        assert_close(output.logits_BC, golden.arrays[f"k{k}/logits{i}"], atol=1e-5, rtol=0)
        assert_close(output.loss_B.mean(), golden.arrays[f"k{k}/loss{i}"], atol=1e-5, rtol=0)
        check_memory(output, golden, f"k{k}/", i)
    sum(output.loss_B.mean() for output in outputs).backward()
    check_gradients(dict(model.named_parameters()) | hypernets, golden, f"k{k}/grad/")


def check_memory(output: ClassifierOutput, golden: Golden, prefix: str, i: int) -> None:
    """Ours at padding differs: no expert works on it there. Nothing reads it, here or there."""
    # [L, M, B, D] and [S, M, B] there. The last query sees all that is no padding.
    published = golden.arrays[f"{prefix}mems{i}"].transpose(1, 2)
    padding_BM = golden.arrays[f"{prefix}memmask{i}"][-1].t().bool()
    assert torch.equal(output.memory_padding_BM, padding_BM)
    for layer_BMD, published_BMD in zip(output.memory, published, strict=False):
        assert_close(layer_BMD[~padding_BM], published_BMD[~padding_BM], atol=1e-5, rtol=0)


def check_gradients(tensors: dict[str, torch.Tensor], golden: Golden, prefix: str) -> None:
    published = ours(golden, prefix)
    unused = {name for name in published if name.startswith("output.")}
    assert all(torch.all(published[name] == 0) for name in unused)
    assert published.keys() - unused == tensors.keys()
    for name, gradient in published.items():
        if name not in unused:
            assert_close(tensors[name].grad, gradient, atol=1e-5, rtol=0)


def small_classifier(**changes: object) -> Classifier:
    moe = MoEConfig(layers="1", n_experts=4, d_expert=10, top_k=2)
    return Classifier(small_config(**changes), moe, n_classes=3, seed=5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_sentence_scores_the_same_however_far_it_is_padded(pre_norm: bool) -> None:
    model = small_classifier(pre_norm=pre_norm).double()
    ids_BS = torch.arange(10).view(2, 5) ** 2 % VOCABULARY
    alone = model(ids_BS, torch.zeros(2, 5, dtype=torch.bool))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[:, :4] = True
    padded = model(torch.cat([torch.full((2, 4), 7), ids_BS], dim=1), padding)
    assert_close(padded.logits_BC, alone.logits_BC, rtol=0, atol=1e-12)
    assert len(padded.routings[0].weights_TK) == len(alone.routings[0].weights_TK)  # padding is not routed


def test_memory_reaches_the_next_batch_and_its_padding_does_not() -> None:
    model = small_classifier().double()
    ids_BS = torch.arange(10).view(2, 5) ** 2 % VOCABULARY
    none_BS = torch.zeros(2, 5, dtype=torch.bool)
    half_BS = none_BS.clone()
    half_BS[0, :3] = True
    first = model(ids_BS, half_BS)
    other_ids_BS = ids_BS.masked_fill(half_BS, 1)
    other = model(other_ids_BS, half_BS)
    after = [model(ids_BS, none_BS, None, f.memory, f.memory_padding_BM).logits_BC for f in (first, other)]
    assert torch.equal(after[0], after[1])
    assert not torch.allclose(after[0], model(ids_BS, none_BS).logits_BC)


def test_gradients_are_finite_where_a_row_is_padding_but_for_one_token() -> None:
    model = small_classifier()
    padding = torch.ones(2, 5, dtype=torch.bool)
    padding[:, -1] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        model(torch.zeros(2, 5, dtype=torch.int64), padding, torch.tensor([0, 2])).loss_B.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
