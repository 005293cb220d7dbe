"""Two passes of different routing over the same text, as THOR trains."""

from dataclasses import replace

import pytest
import torch

from megamoe.config.schema import ModelConfig, MoEConfig, RouterConfig
from megamoe.models.transformer_xl import ModelOutput, TransformerXL

B, S, V, E = 3, 7, 11, 4
SIZES = ModelConfig(
    vocab_size=V, n_layers=2, d_model=8, n_heads=2, d_head=4, d_inner=12, dropout=0.0, segment_len=S,
    memory_len=S, init_std=0.3,
)  # fmt: skip
MOE = MoEConfig(n_experts=E, d_expert=6, top_k=1, router=RouterConfig(name="thor"))
STEP = 4


def build(model: ModelConfig = SIZES, moe: MoEConfig = MOE) -> TransformerXL:
    return TransformerXL(model, moe, seed=3).double()


def text(segment: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BN = torch.randint(0, V, (B, 3 * S + 1), generator=torch.Generator().manual_seed(1))
    return ids_BN[:, segment * S : (segment + 1) * S], ids_BN[:, segment * S + 1 : (segment + 1) * S + 1]


def one_route(model: TransformerXL, route: int, memory: tuple[torch.Tensor, ...] | None) -> ModelOutput:
    """What a model gives that has the drawn experts alone."""
    single = build(moe=replace(MOE, n_experts=1))
    weights = dict(model.state_dict())
    for layer in model.moe_layers:
        draws = layer.router.spec.generator("draw", STEP)
        expert = int(torch.randint(E, (2,), generator=draws)[route])
        for leaf in ("w_in", "b_in", "w_out", "b_out"):
            name = f"layers.{layer.layer}.moe.experts.{leaf}"
            weights[name] = weights[name][expert : expert + 1]
    single.load_state_dict(weights)
    ids_BS, targets_BS = text(1)
    return single.eval()(ids_BS, targets_BS, memory, return_logits=True)


def test_the_loss_is_the_mean_and_the_divergence_is_symmetric() -> None:
    model = build()
    ids_BS, targets_BS = text(0)
    memories = [model.eval()((ids_BS + shift) % V, targets_BS).memory for shift in (0, 1)]
    memory = tuple(torch.cat(both, 1) for both in zip(*memories, strict=True))
    ids_BS, targets_BS = text(1)
    output = model.train()(ids_BS, targets_BS, memory, step=STEP, return_logits=True)
    first, second = (one_route(model, route, memories[route]) for route in (0, 1))
    torch.testing.assert_close(output.loss_BS, (first.loss_BS + second.loss_BS) / 2)
    assert (first.loss_BS - second.loss_BS).abs().max() > 1e-3
    p, q = first.logits_BSV.softmax(-1), second.logits_BSV.softmax(-1)
    divergence = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    losses = [routing.losses for routing in output.routings]
    assert [list(found) for found in losses] == [[], ["consistency"]]
    torch.testing.assert_close(losses[1]["consistency"], divergence)
    torch.testing.assert_close(output.logits_BSV, first.logits_BSV)
    torch.testing.assert_close(output.hidden_BSD, first.hidden_BSD)
    for found, *expected in zip(output.memory, first.memory, second.memory, strict=True):
        torch.testing.assert_close(found, torch.cat(expected, 1))


def test_equal_experts_do_not_diverge() -> None:
    model = build()
    for parameter in (p for name, p in model.named_parameters() if ".experts." in name):
        parameter.data[:] = parameter.data[:1].clone()
    output = model(*text(), step=STEP)
    assert output.routings[-1].losses["consistency"].item() == pytest.approx(0, abs=1e-12)


def test_routes_draw_dropout_of_their_own() -> None:
    sizes = replace(SIZES, dropout=0.3)
    model = build(sizes, replace(MOE, n_experts=1))
    output = model(*text(), step=STEP)
    assert output.routings[-1].losses["consistency"].item() > 1e-4
    alone = TransformerXL(sizes, replace(MOE, n_experts=1, router=RouterConfig(name="smoe")), seed=3).double()
    alone.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(alone(*text(), step=STEP).hidden_BSD, output.hidden_BSD)


def test_evaluation_makes_one_pass() -> None:
    output = build().eval()(*text(), step=STEP)
    assert len(output.routings[0].expert_ids_TK) == B * S
    assert output.routings[-1].losses == {}
    assert len(output.routings[0].expert_ids_TK.unique()) > 1


def test_both_routes_train_their_experts() -> None:
    model = build()
    output = model(*text(), step=STEP)
    (output.loss_BS.mean() + output.routings[-1].losses["consistency"]).backward()
    for layer in model.moe_layers:
        drawn = torch.randint(E, (2,), generator=layer.router.spec.generator("draw", STEP)).tolist()
        moved = layer.experts.w_in.grad.flatten(1).any(1).nonzero().flatten().tolist()
        assert moved == sorted(set(drawn))


def test_fuse_distillation_starts_without_divergence_and_learns_both_routes() -> None:
    router = RouterConfig(name="lms", options={"fuse": True, "rank": 3})
    model = build(moe=replace(MOE, router=router))
    ids_BS, targets_BS = text()
    domains_B2 = torch.tensor([[1, 1], [2, 1], [0, 0]])
    output = model(ids_BS, targets_BS, step=STEP, domains_B2=domains_B2)
    assert output.routings[-1].losses["consistency"].item() == pytest.approx(0, abs=1e-12)
    for layer in model.moe_layers:
        for name in ("u_in", "u_out"):
            values = getattr(layer.router, name).data
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(2)))
    output = model(ids_BS, targets_BS, step=STEP, domains_B2=domains_B2)
    shared = model.eval()(ids_BS, targets_BS)
    own = model(ids_BS, targets_BS, domains_B2=domains_B2)
    torch.testing.assert_close(output.loss_BS, (shared.loss_BS + own.loss_BS) / 2)
    assert (shared.loss_BS - own.loss_BS).abs().amax(1).gt(1e-4).tolist() == [True, True, False]
    output.routings[-1].losses["consistency"].backward()
    gradient = model.moe_layers[0].router.u_in.grad.flatten(1).abs().amax(1)
    assert (gradient > 0).tolist() == [True, True, False]  # u of the targets 0 (the other route) and 1
