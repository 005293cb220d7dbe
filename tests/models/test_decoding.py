"""Token by token as in one pass: the same scores, whatever the model, the policy and the lengths of rows."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.models.attention import AttentionSpan
from megamoe.models.decoding import Decoder, read_text
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routers import router_class
from megamoe.moe.routers.registry import BUILT_IN
from tests.models.builders import VOCABULARY, small_config, small_model

CAUSAL = [name for name in BUILT_IN if router_class(name).causal != "never"]
# Capacity counts tokens of one pass, and a single one is never too many.
OPTIONS: dict[str, dict[str, Any]] = {"switch": {"eval_capacity_factor": 0.0}}
STARTS = (7, 0, 3)
"""Tokens of each row that are read as a prompt."""
N_STEPS = 11


def texts() -> torch.Tensor:
    shape = (len(STARTS), max(STARTS) + N_STEPS)
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decode(model: TransformerXL, ids_BS: torch.Tensor, span: AttentionSpan, top_k: int = 2) -> torch.Tensor:
    """Scores [B, N_STEPS, V] of the tokens after those of STARTS, read one by one in one batch."""
    prompts = [row_S[:start] for row_S, start in zip(ids_BS, STARTS, strict=True)]
    pasts = [read_text(model, ids_S, span, top_k=top_k, step=9) for ids_S in prompts]
    decoder = Decoder(model, pasts, span, top_k=top_k, step=9)
    steps = [torch.tensor(STARTS) + n for n in range(N_STEPS)]
    return torch.stack([decoder.read(ids_BS.gather(1, at[:, None])[:, 0]) for at in steps], dim=1)


@torch.no_grad()
def score(
    model: TransformerXL, ids_BS: torch.Tensor, span: AttentionSpan | None, top_k: int = 2
) -> torch.Tensor:
    """The same from one pass over each whole text."""
    output = model(ids_BS, top_k=top_k, step=9, span=span, return_logits=True)
    rows = zip(output.logits_BSV, STARTS, strict=True)
    return torch.stack([logits_SV[start : start + N_STEPS] for logits_SV, start in rows])


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("policy", CAUSAL)
def test_every_policy_that_is_causal(policy: str, top_k: int) -> None:
    moe = MoEConfig(
        n_experts=4, d_expert=10, top_k=2, router=RouterConfig(name=policy, options=OPTIONS.get(policy, {}))
    )
    model = TransformerXL(small_config(segment_len=20), moe, seed=5).eval()
    draws = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draws), alpha=0.2)
    whole = AttentionSpan(max(STARTS) + N_STEPS, same_length=True)
    actual = decode(model, texts(), whole, top_k)
    assert_close(actual, score(model, texts(), None, top_k), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 18, 40])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_layers": "1", "pre_norm": True},
        {"moe_layers": "none"},
        {"cutoffs": (4, 10), "div_val": 2, "tie_projections": True},
    ],
)
@pytest.mark.parametrize("clamp_len", [0, 3])
def test_every_window_and_model(changes: dict[str, Any], window: int, clamp_len: int) -> None:
    """Also far beyond the window, where one pass hides what is further back."""
    model, span = small_model(**changes).double().eval(), AttentionSpan(window, True, clamp_len)
    actual = decode(model, texts(), span)
    assert_close(actual, score(model, texts(), span), atol=1e-12, rtol=0)
    if window < max(STARTS) + N_STEPS:
        assert not torch.allclose(actual, score(model, texts(), AttentionSpan(0, clamp_len=clamp_len)))


@pytest.mark.parametrize("policy", ["random", "thor"])
def test_policies_that_look_at_the_place_in_a_segment(policy: str) -> None:
    """It goes on counting where the prompt's segments end."""
    moe = MoEConfig(n_experts=4, d_expert=10, top_k=2, router=RouterConfig(name=policy))
    model = TransformerXL(small_config(), moe, seed=5).double().eval()
    span, ids_1S = AttentionSpan(5, same_length=True), texts()[:1]
    decoder = Decoder(model, [read_text(model, ids_1S[0, :4], span, top_k=2, step=0)], span, top_k=2, step=0)
    actual = torch.stack([decoder.read(ids_1S[:, n]) for n in range(4, 12)], dim=1)
    first = model(ids_1S[:, :6], span=span, top_k=2, return_logits=True)
    second = model(ids_1S[:, 6:12], memory=first.memory, span=span, top_k=2, return_logits=True)
    expected = torch.cat([first.logits_BSV[:, 4:], second.logits_BSV], dim=1)
    assert_close(actual, expected, atol=1e-12, rtol=0)


def test_reading_leaves_the_memories_as_they_were() -> None:
    model, span = small_model().eval(), AttentionSpan(5, same_length=True)
    past = read_text(model, texts()[0], span, top_k=2, step=0)
    before = [x.clone() for x in past.memory]
    first, second = (Decoder(model, [past], span, top_k=2, step=0) for _ in range(2))
    ids_B = torch.tensor([3])
    scores = first.read(ids_B)
    assert not torch.equal(first.read(ids_B), scores)
    assert torch.equal(second.read(ids_B), scores)
    assert all(map(torch.equal, past.memory, before))
