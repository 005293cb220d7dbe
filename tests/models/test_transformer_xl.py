from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megamoe.config.schema import MoEConfig
from megamoe.errors import ConfigError
from megamoe.models.attention import AttentionSpan
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.dropout import Dropout
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import token_keys
from megamoe.moe.ranks import OneRank
from megamoe.moe.routing import RouterContext, Routing
from tests.models.builders import VOCABULARY, small_config, small_model


def tokens(length: int, seed: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def hidden_states(
    model: TransformerXL, ids_BS: torch.Tensor, lengths: list[int], span: AttentionSpan | None = None
) -> torch.Tensor:
    """What the last layer makes of `ids_BS`, read in consecutive segments of these lengths."""
    memory, hidden = None, []
    for part in ids_BS.split(lengths, dim=1):
        output = model(part, memory=memory, span=span)
        memory = output.memory
        hidden.append(output.hidden_BSD)
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("moe_layers", ["all", "1", "none"])
def test_memory_stands_in_for_the_text_before(moe_layers: str, pre_norm: bool) -> None:
    model = small_model(moe_layers=moe_layers, pre_norm=pre_norm).double()
    ids_BS = tokens(12)
    whole = hidden_states(model, ids_BS, [12])
    long, none = AttentionSpan(memory_len=12), AttentionSpan(memory_len=0)
    assert_close(hidden_states(model, ids_BS, [4, 4, 4], long), whole, atol=1e-12, rtol=0)
    assert_close(hidden_states(model, ids_BS, [1, 5, 6], long), whole, atol=1e-12, rtol=0)
    assert not torch.allclose(hidden_states(model, ids_BS, [4, 4, 4], none), whole)


@pytest.mark.parametrize(("moe_layers", "n_shared"), [("all", 1), ("1", 2), ("none", 0)])
@torch.no_grad()
def test_another_k_goes_on_from_the_trunk(moe_layers: str, n_shared: int) -> None:
    model = small_model(moe_layers=moe_layers).eval()
    ids_BS, targets_BS = tokens(6), tokens(6, seed=2)
    memory = model(tokens(6, seed=3)).memory
    trunk = model(ids_BS, targets_BS, memory, top_k=1).trunk
    shared = model(ids_BS, targets_BS, memory, top_k=4, trunk=trunk)
    alone = model(ids_BS, targets_BS, memory, top_k=4)
    assert torch.equal(shared.loss_BS, alone.loss_BS) and torch.equal(shared.hidden_BSD, alone.hidden_BSD)
    assert all(map(torch.equal, shared.memory, alone.memory))
    assert [a is b for a, b in zip(shared.memory, trunk.memory, strict=False)] == [True] * n_shared


def test_there_is_no_trunk_where_gradients_or_dropout_are() -> None:
    model = small_model()
    assert model.eval()(tokens(6)).trunk is None
    with torch.no_grad():
        trunk = model(tokens(6)).trunk
        assert model.train()(tokens(6)).trunk is None
        with pytest.raises(AssertionError, match="without gradient"):
            model(tokens(6), trunk=trunk)
    with pytest.raises(AssertionError, match="without gradient"):
        model.eval()(tokens(6), trunk=trunk)


def test_same_length_makes_the_segments_immaterial() -> None:
    model = small_model().double()
    ids_BS, span = tokens(12), AttentionSpan(memory_len=3, same_length=True)
    whole = hidden_states(model, ids_BS, [12], span)
    assert_close(hidden_states(model, ids_BS, [4, 3, 5], span), whole, atol=1e-12, rtol=0)


def test_clamping_matters_only_beyond_its_distance() -> None:
    model = small_model().double()
    ids_BS = tokens(8)
    exact = hidden_states(model, ids_BS, [8])
    clamped = hidden_states(model, ids_BS, [8], AttentionSpan(6, clamp_len=3))
    assert_close(clamped[:, :4], exact[:, :4], atol=1e-12, rtol=0)
    assert not torch.allclose(clamped[:, 4:], exact[:, 4:])


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"cutoffs": (4, 10), "div_val": 2}])
def test_later_tokens_do_not_reach_back(changes: dict[str, Any]) -> None:
    model = small_model(**changes).double()
    ids_BS, targets_BS = tokens(10), tokens(10, seed=2)
    altered_BS = ids_BS.clone()
    altered_BS[:, 7:] = (ids_BS[:, 7:] + 1) % VOCABULARY

    def losses(ids_BS: torch.Tensor) -> torch.Tensor:
        first = model(ids_BS[:, :5], targets_BS[:, :5])
        second = model(ids_BS[:, 5:], targets_BS[:, 5:], first.memory)
        return torch.cat([first.loss_BS, second.loss_BS], dim=1)

    assert_close(losses(altered_BS)[:, :7], losses(ids_BS)[:, :7], atol=1e-12, rtol=0)
    altered_BS = ids_BS.clone()
    altered_BS[:, 0] = (ids_BS[:, 0] + 1) % VOCABULARY
    assert torch.all(losses(altered_BS)[:, 5:] != losses(ids_BS)[:, 5:])


def test_memory_holds_the_latest_layer_inputs_without_gradient() -> None:
    model = small_model()
    memory, lengths = None, []
    for _ in range(4):
        output = model(tokens(3), memory=memory, span=AttentionSpan(memory_len=7))
        memory = output.memory
        assert len(memory) == 2 and not any(layer_input.requires_grad for layer_input in memory)
        lengths.append(memory[0].shape[1])
    assert lengths == [3, 6, 7, 7]
    assert_close(memory[0][:, -3:], model.embedding(tokens(3)))
    assert model(tokens(9), span=AttentionSpan(memory_len=0)).memory[0].shape == (2, 0, 8)
    assert model(tokens(9)).memory[0].shape == (2, 6, 8)


def test_returns_what_is_asked_for() -> None:
    model = small_model(moe_layers="1")
    silent = model(tokens(4))
    assert silent.loss_BS is None and silent.logits_BSV is None and silent.hidden_BSD.shape == (2, 4, 8)
    asked = model(tokens(4), tokens(4, seed=2), return_logits=True)
    assert asked.loss_BS.shape == (2, 4) and asked.logits_BSV.shape == (2, 4, VOCABULARY)
    assert len(asked.routings) == 1 and [layer.layer for layer in model.moe_layers] == [1]


def test_top_k_defaults_to_the_setting_and_is_checked() -> None:
    model = small_model()
    assert [routing.expert_ids_TK.shape for routing in model(tokens(4)).routings] == [(8, 2)] * 2
    assert [routing.expert_ids_TK.shape for routing in model(tokens(4), top_k=3).routings] == [(8, 3)] * 2
    with pytest.raises(ConfigError, match="top_k = 5: give 1 to 4"):
        model(tokens(4), top_k=5)


def test_routers_are_told_what_they_may_look_at() -> None:
    contexts: list[RouterContext] = []

    class Witness(MoELayer):
        def forward(self, x_BSD: torch.Tensor, context: RouterContext) -> tuple[torch.Tensor, Routing]:
            contexts.append(context)
            return super().forward(x_BSD, context)

    all_ranks = OneRank()
    moe = MoEConfig(n_experts=4, d_expert=10)
    model = TransformerXL(small_config(n_layers=3), moe, seed=5, build_moe_layer=Witness, ranks=all_ranks)
    ids_BS = tokens(4)
    output = model(ids_BS, top_k=3, step=17, rows=range(3, 5))
    assert [context.previous for context in contexts] == [None, *output.routings[:2]]
    for context in contexts:
        assert (context.step, context.seed, context.top_k) == (17, 5, 3)
        assert context.ranks is all_ranks
        assert torch.equal(context.token_ids_T, ids_BS.flatten())
        assert context.sequence_T.tolist() == [0] * 4 + [1] * 4
        assert torch.equal(context.token_keys_T, token_keys(5, 17, range(3, 5), 4).flatten())


def test_dropout_is_for_training_only() -> None:
    model = small_model(dropout=0.4, attention_dropout=0.3)
    ids_BS, targets_BS = tokens(5), tokens(5, seed=2)
    losses = [model(ids_BS, targets_BS, step=step).loss_BS for step in (0, 1)]
    assert not torch.equal(*losses)
    model.eval()
    losses = [model(ids_BS, targets_BS, step=step).loss_BS for step in (0, 1)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("moe_layers", ["all", "none"])
def test_dropout_of_a_row_depends_on_no_other(moe_layers: str) -> None:
    """The global batch at once, and in parts of 1 and 3 rows that say which they are."""
    model = small_model(moe_layers=moe_layers, dropout=0.3, attention_dropout=0.2).double()
    texts = [tokens(6, seed, batch=4) for seed in (1, 2, 3)]

    def losses(rows: range | None) -> torch.Tensor:
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        memory, found = None, []
        for step, (ids_BS, targets_BS) in enumerate(pairwise(texts)):
            output = model(ids_BS[part], targets_BS[part], memory, step=step, rows=rows)
            memory = output.memory
            found.append(output.loss_BS)
        return torch.cat(found, dim=1)

    whole = losses(None)
    assert_close(torch.cat([losses(range(1)), losses(range(1, 4))]), whole, atol=1e-12, rtol=0)


def test_every_place_drops_units_of_its_own() -> None:
    model = small_model(moe_layers="0", dropout=0.3, attention_dropout=0.2)
    sites = [module.site for module in model.modules() if isinstance(module, Dropout)]
    assert len(sites) == len(set(sites)) == 11
    assert all(module.p > 0 for module in model.modules() if isinstance(module, Dropout))


def test_training_draws_nothing_from_the_random_state_of_the_process() -> None:
    model = small_model(dropout=0.3, attention_dropout=0.2)
    before = torch.get_rng_state()
    model(tokens(6), tokens(6, seed=2)).loss_BS.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_both_dropouts_reach_the_model(where: str) -> None:
    model = small_model(**{where: 0.4})
    assert not torch.equal(model(tokens(5)).hidden_BSD, model.eval()(tokens(5)).hidden_BSD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_16_bits_with_losses_in_fp32(dtype: torch.dtype) -> None:
    model = small_model(init_std=0.1)
    ids_BS, targets_BS = tokens(6), tokens(6, seed=2)
    exact = model(ids_BS, targets_BS, model(ids_BS).memory)
    for parameter in model.parameters():  # as DeepSpeed does: buffers stay fp32
        parameter.data = parameter.data.to(dtype)
    first = model(ids_BS)
    rounded = model(ids_BS, targets_BS, first.memory, return_logits=True)
    assert first.memory[1].dtype == rounded.hidden_BSD.dtype == dtype
    assert rounded.loss_BS.dtype == rounded.logits_BSV.dtype == torch.float32
    assert rounded.routings[0].weights_TK.dtype == torch.float32
    assert_close(rounded.loss_BS, exact.loss_BS, atol=0.1, rtol=0)
    rounded.loss_BS.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_parameter_gets_a_gradient_whatever_the_tokens() -> None:
    model = small_model(cutoffs=(4, 10), div_val=2)
    ids_BS = torch.zeros(1, 2, dtype=torch.int64)
    model(ids_BS, ids_BS, top_k=2).loss_BS.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_tied_weights_are_one_tensor_and_untied_ones_are_two() -> None:
    assert "output.weights.0" not in small_model().state_dict()
    model = small_model(tie_weights=False)
    assert model.output.weights[0].shape == model.embedding.weights[0].shape
    assert not torch.equal(model.output.weights[0], model.embedding.weights[0])


def test_names_say_expert_only_for_experts() -> None:
    model = small_model(moe_layers="0", cutoffs=(4, 10), div_val=2)
    names = [*model.state_dict(), *(name for name, _ in model.named_modules())]
    for name in names:
        path, _, _ = name.partition(".experts")
        assert "expert" not in path, name
    assert {name for name in names if name.startswith("layers.1.")} >= {
        "layers.1.attention.qkv.weight", "layers.1.attention_norm.weight", "layers.1.feed_forward.w_in",
        "layers.1.feed_forward_norm.bias",
    }  # fmt: skip


def test_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 0"):
        TransformerXL(small_config(vocab_size=0), MoEConfig(), seed=1)
