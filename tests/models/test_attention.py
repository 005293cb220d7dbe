import pytest
import torch
from torch.testing import assert_close

from megamoe.errors import ConfigError
from megamoe.models import attention
from megamoe.models.attention import (
    AttentionInputs,
    AttentionSpan,
    RelativeAttention,
    encode_distances,
    hide_keys,
)
from megamoe.moe.dropout import Dropout
from tests.oracles import attention as oracle

B, D, A, W = 2, 6, 2, 5


def draw(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module.double()


def inputs_for(segment_len: int, context_len: int, span: AttentionSpan, d_model: int = D) -> AttentionInputs:
    generator = torch.Generator().manual_seed(8)
    like = torch.empty(0, dtype=torch.float64)
    bias_u, bias_v = torch.randn(2, A, W, generator=generator, dtype=torch.float64).unbind()
    return AttentionInputs(
        encode_distances(context_len, d_model, span.clamp_len, like),
        hide_keys(segment_len, context_len, span, like.device),
        bias_u.requires_grad_(),
        bias_v.requires_grad_(),
    )


def context_of(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(B, length, D, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("clamp_len", [0, 2])
@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("query_block", [2, 128])
@pytest.mark.parametrize(
    ("segment_len", "memory_len", "in_memory"), [(1, 4, 0), (5, 3, 0), (5, 3, 3), (2, 7, 7), (3, 6, 4)]
)
def test_equals_the_loop_over_queries_heads_and_keys(
    segment_len: int,
    memory_len: int,
    in_memory: int,
    query_block: int,
    same_length: bool,
    clamp_len: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", query_block)
    span = AttentionSpan(memory_len, same_length, clamp_len)
    module = draw(RelativeAttention(D, A, W, Dropout(0.0, "probabilities")))
    context = context_of(in_memory + segment_len)
    inputs = inputs_for(segment_len, in_memory + segment_len, span)
    weights = {name: getattr(module, name).weight for name in ("qkv", "position", "output")}

    actual = module(context, inputs)
    expected = oracle.relative_attention(
        context, segment_len, weights, inputs.bias_u_AW, inputs.bias_v_AW,
        window=memory_len if same_length else None, clamp_len=clamp_len,
    )  # fmt: skip
    # Frequencies are rounded to fp32, as published; the oracle's are not.
    assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    sources = [context, inputs.bias_u_AW, inputs.bias_v_AW, *weights.values()]
    weighting = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view_as(actual)
    for ours, theirs in zip(
        torch.autograd.grad((actual * weighting).sum(), sources),
        torch.autograd.grad((expected * weighting).sum(), sources),
        strict=True,
    ):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("segment_len", [127, 128, 129, 300])
def test_query_blocks_do_not_matter(segment_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = draw(RelativeAttention(D, A, W, Dropout(0.0, "probabilities")))
    context = context_of(segment_len + 10)
    inputs = inputs_for(segment_len, segment_len + 10, AttentionSpan(10))
    results = []
    for query_block in (128, 1000):
        monkeypatch.setattr(attention, "QUERY_BLOCK", query_block)
        output = module(context, inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), [context, *module.parameters()])))
    for blocked, whole in zip(*results, strict=True):
        assert_close(blocked, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_of_16_bit_scores_is_computed_in_fp32(dtype: torch.dtype) -> None:
    scores = torch.randn(16, 1000, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    scores[:, 600:] = -torch.inf
    assert torch.equal(scores.softmax(dim=-1), scores.float().softmax(dim=-1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_distances_are_encoded_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    encoded = encode_distances(1023, 256, 0, like)
    exact = torch.stack([oracle.sinusoid(distance, 256) for distance in range(1023, -1, -1)])
    assert encoded.dtype == dtype
    assert_close(encoded.double(), exact, atol=torch.finfo(dtype).eps / 2 + 1e-4, rtol=0)


def test_same_length_shows_every_query_equally_many_keys() -> None:
    hidden = hide_keys(4, 10, AttentionSpan(memory_len=6, same_length=True), torch.device("cpu"))
    assert (~hidden).sum(1).tolist() == [6, 6, 6, 6]
    hidden = hide_keys(4, 10, AttentionSpan(memory_len=6), torch.device("cpu"))
    assert (~hidden).sum(1).tolist() == [7, 8, 9, 10]


def test_same_length_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="memory_len above 0"):
        AttentionSpan(memory_len=0, same_length=True)
