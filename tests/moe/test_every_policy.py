"""What holds for every registered policy; one that is added later is tried here without a line."""

from dataclasses import replace

import pytest
import torch

from megamoe.errors import ConfigError
from megamoe.moe.routers import available, router_class
from tests.moe.policies import (
    STEP,
    B,
    D,
    E,
    S,
    apply,
    apply_oracle,
    build_layer,
    context_of,
    fresh_layer,
    oracle_cases,
    tokens,
)

EXACT = {"atol": 1e-11, "rtol": 1e-9}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize(("name", "options"), oracle_cases(), ids=str)
def test_equals_its_equations(name, options, top_k, training):
    layer, x_BSD, context = build_layer(name, options).train(training), tokens(), context_of(top_k)
    y_TD, routing, gradients = apply(layer, x_BSD, context)
    decided, expected = apply_oracle(layer, x_BSD, context, name)
    chosen = [sorted(e for e in row if e >= 0) for row in routing.expert_ids_TK.tolist()]
    assert chosen == [sorted(e for e in row if e >= 0) for row in decided.ids]
    torch.testing.assert_close(y_TD, decided.y_TD.detach(), **EXACT)
    assert routing.losses.keys() == decided.losses.keys()
    for loss, value in routing.losses.items():
        torch.testing.assert_close(value, decided.losses[loss], msg=loss, check_dtype=False, **EXACT)
    assert gradients.keys() == expected.keys()
    for tensor, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[tensor], msg=lambda m, t=tensor: f"{t}: {m}", **EXACT)


@pytest.mark.parametrize("name", available())
def test_evaluation_is_deterministic_and_needs_no_keys(name):
    layer, x_BSD = build_layer(name).eval(), tokens()
    before, _ = layer(x_BSD, context_of())
    torch.manual_seed(9)
    other_step = replace(context_of(step=STEP + 1, seed=6), token_keys_T=None)
    assert torch.equal(layer(x_BSD, other_step)[0], before)


@pytest.mark.parametrize("name", available())
def test_training_is_a_function_of_the_step(name):
    layer, x_BSD = build_layer(name), tokens()
    y, first = layer(x_BSD, context_of())
    torch.manual_seed(9)
    again, second = layer(x_BSD, context_of())
    assert torch.equal(y, again)
    assert torch.equal(first.expert_ids_TK, second.expert_ids_TK)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_later_tokens_do_not_change_earlier_ones(name, training):
    """Within each sequence, in the modes that the policy declares."""
    causal = router_class(name).causal
    layer, n_early = build_layer(name).train(training), 5
    x_BSD, changed = tokens(), tokens()
    changed[:, n_early:] = 50 * tokens(seed=1)[:, n_early:]
    y, _ = layer(x_BSD, context_of())
    other, _ = layer(changed, context_of())
    deviation = (y - other)[:, :n_early].abs().max().item()
    if causal == "always" or (causal == "evaluation" and not training):
        assert deviation < 1e-12
    else:
        assert deviation > 1e-6, "the policy is causal here and may say so"


@pytest.mark.parametrize("name", available())
def test_sequences_do_not_change_each_other_in_evaluation(name):
    layer, x_BSD = build_layer(name).eval(), tokens()
    together, _ = layer(x_BSD, context_of())
    for row in range(B):
        alone, _ = layer(x_BSD[row : row + 1], context_of(rows=range(row, row + 1)))
        torch.testing.assert_close(alone[0], together[row], **EXACT)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_tokens_are_no_problem(name, training):
    """A rank whose sentences are all padding has none."""
    layer = build_layer(name).train(training)
    context = context_of()
    none = replace(
        context, token_ids_T=context.token_ids_T[:0], token_keys_T=context.token_keys_T[:0],
        sequence_T=context.sequence_T[:0], domain_T2=context.domain_T2[:0],
        route_T=context.route_T[:0],
        previous=replace(
            context.previous, expert_ids_TK=context.previous.expert_ids_TK[:0],
            weights_TK=context.previous.weights_TK[:0], logits_TE=context.previous.logits_TE[:0],
        ),
    )  # fmt: skip
    y, _ = layer(torch.zeros(1, 0, D, dtype=torch.double), none)
    assert y.shape == (1, 0, D)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_routes_in_fp32_when_the_model_has_16_bits(name, training):
    layer = build_layer(name).float().train(training)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    context = replace(context_of(), previous=None)
    y, routing = layer(tokens().bfloat16(), context)
    assert y.dtype == torch.bfloat16
    assert routing.weights_TK.dtype == torch.float32
    assert routing.logits_TE is None or routing.logits_TE.dtype == torch.float32
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", available())
def test_nothing_it_owns_is_named_after_experts(name):
    router = build_layer(name).router
    assert not [key for key in router.state_dict() if "expert" in key]


@pytest.mark.parametrize("name", available())
def test_a_router_is_a_function_of_seed_and_layer(name):
    torch.manual_seed(1)
    one = fresh_layer(name).router.state_dict()
    torch.manual_seed(2)
    again, other = fresh_layer(name).router.state_dict(), fresh_layer(name, layer=2).router.state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    drawn = [key for key, value in one.items() if len(value.unique()) > 1]
    assert all(not torch.equal(one[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("top_k", [0, E + 1])
def test_an_impossible_k_is_refused(name, top_k):
    cls = router_class(name)
    if cls.experts_per_token(1, E) != cls.experts_per_token(2, E):
        with pytest.raises(ConfigError, match=f"top_k = {top_k}: give 1 to {E}"):
            build_layer(name)(tokens(), context_of(top_k))


@pytest.mark.parametrize("name", available())
def test_recomputed_activations_give_the_same_gradients(name):
    layer, x_BSD, context = build_layer(name), tokens(), context_of()
    y, _, kept = apply(layer, x_BSD, context)
    layer.checkpoint_activations = True
    again, _, recomputed = apply(layer, x_BSD, context)
    assert torch.equal(y, again)
    for tensor, gradient in kept.items():
        torch.testing.assert_close(recomputed[tensor], gradient, msg=tensor, atol=1e-14, rtol=1e-12)


def test_the_batch_is_big_enough_to_show_differences():
    assert B * S > 2 * E
