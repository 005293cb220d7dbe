"""What the papers say of their policies, where it can be said in one line of mathematics."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.initialization import generator
from megamoe.moe.layer import MoELayer
from megamoe.moe.ranks import ONE_RANK
from megamoe.moe.routers.cka import cka
from megamoe.moe.routers.clustering import tightness
from megamoe.moe.routers.competition import BLOCK, competes
from megamoe.moe.routers.similarity import pair_shares
from megamoe.moe.routers.sinkhorn import balanced
from megamoe.moe.routing import Router, Routing
from megamoe.moe.selection import choices_per_expert
from megamoe.moe.updates import update_routers
from megamoe.parallel.optimizer import parameter_groups
from tests.moe.policies import D, E, F, S, V, apply, build_layer, context_of, fresh_layer, learn, tokens
from tests.parallel.runs import small_run


def route(router: Router, x_TD: torch.Tensor, top_k: int = 2, step: int = 3) -> Routing:
    return router(x_TD, context_of(top_k, step))


def flat(seed: int = 0) -> torch.Tensor:
    return tokens(seed).flatten(0, 1)


@pytest.mark.parametrize("name", ["switch", "omni", "sigma", "relu", "base", "sinkhorn", "stable"])
def test_one_expert_still_teaches_the_router(name):
    *_, gradients = apply(build_layer(name), tokens(), context_of(top_k=1))
    assert any(torch.count_nonzero(g) for key, g in gradients.items() if key.startswith("router.weight"))


def test_switch_takes_who_comes_first():
    layer = build_layer("switch", {"capacity_factor": 0.5})
    layer.router.weight.data[:] = 0
    layer.router.weight.data[2] = 5 * tokens()[0, 0].sign()
    x_BSD = tokens()[0, 0].expand(3, S, D)
    _, routing = layer(x_BSD, context_of())
    room = math.ceil(0.5 * S / E)
    assert routing.expert_ids_TK[:, 0].tolist() == ([2] * room + [-1] * (S - room)) * 3
    assert routing.wanted_TK.unique().tolist() == [2]


def test_gshard_keeps_second_choices_as_often_as_it_says():
    router = build_layer("gshard", {"capacity_factor": 0}).router
    wanted = kept = 0.0
    for step in range(200):
        routing = route(router, flat(step), step=step)
        wanted += (2 * router.eval()(flat(step), context_of()).weights_TK[:, 1]).clamp(max=1).sum().item()
        kept += (routing.expert_ids_TK[:, 1] >= 0).sum().item()
        router.train()
    assert kept / wanted == pytest.approx(1, abs=0.03)


def test_dts_goes_from_dense_to_sparse():
    router = build_layer("dts", {"tau_steps": 100, "tau_start": 4.0, "tau_end": 0.02}).router
    sizes = [
        (route(router, flat(), 1, step).expert_ids_TK >= 0).sum(1).float().mean() for step in (0, 95, 100)
    ]
    assert sizes[0] > 0.95 * E
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1.3


def test_hash_looks_at_nothing_but_the_token_id():
    routing = route(build_layer("hash").router, flat())
    ids = context_of().token_ids_T
    assert torch.equal(routing.expert_ids_TK, route(build_layer("hash").router, flat(1)).expert_ids_TK)
    for token in ids.unique():
        assert len(routing.expert_ids_TK[ids == token].unique(dim=0)) == 1


def test_sigma_is_sensitive_to_a_shift_of_all_logits_but_its_loss_is_not():
    layer = build_layer("sigma", {"drop": 0.0})
    x_BSD = torch.cat([tokens()[..., :-1], torch.ones(3, S, 1)], -1).double()
    y, before = layer(x_BSD, context_of())
    layer.router.weight.data[:, -1] += 0.5
    shifted, after = layer(x_BSD, context_of())
    assert (y - shifted).abs().max() > 1e-3
    torch.testing.assert_close(after.losses["entropy"], before.losses["entropy"])
    layer.router.weight.data.zero_()
    _, uniform = layer(x_BSD, context_of())
    assert uniform.losses["entropy"].item() == pytest.approx(-math.log(E))


def test_sigma_starts_as_its_paper_says():
    moe = MoEConfig(n_experts=16, d_expert=32, router=RouterConfig(name="sigma"))
    layer = MoELayer(64, moe, layer=0, seed=1, dropout=0.0, init_std=0.5, n_layers=3)
    rows = layer.router.weight.norm(dim=1)
    torch.testing.assert_close(rows, rows[0].expand(16))
    std = math.sqrt(2 / (64 * 3))
    assert layer.router.weight.std().item() == pytest.approx(std, rel=1e-3)
    assert layer.experts.w_in.std().item() == pytest.approx(std, rel=0.03)
    assert layer.experts.w_out.std().item() == pytest.approx(math.sqrt(2 / (16 * 32 * 3)), rel=0.03)


def test_sigma_with_all_experts_at_weight_one_is_the_dense_network():
    layer, dense = build_layer("sigma"), build_layer("dense")
    dense.experts.load_state_dict(layer.experts.state_dict())
    x_BSD = torch.cat([tokens()[..., :-1], torch.ones(3, S, 1)], -1).double()
    layer.router.weight.data.zero_()
    layer.router.weight.data[:, -1] = 40  # a sigmoid of 1 up to rounding
    y, _ = layer.eval()(x_BSD, context_of(top_k=E))
    torch.testing.assert_close(y, dense.eval()(x_BSD, context_of())[0])


def test_cosine_does_not_see_lengths():
    router = build_layer("cosine").router
    torch.testing.assert_close(route(router, flat()).logits_TE, route(router, 7 * flat()).logits_TE)
    router.centroids.data[1] *= 9
    torch.testing.assert_close(
        route(router, flat()).logits_TE, route(build_layer("cosine").router, flat()).logits_TE
    )


def test_relu_tightens_while_too_many_experts_are_taken():
    layer = fresh_layer("relu", {"lambda_start": 1.0, "rate": 1.5})
    _, routing = layer(tokens().float(), context_of(top_k=1))
    assert (routing.expert_ids_TK >= 0).float().mean() > 1 / E
    update_routers([layer.router], [[routing]], ONE_RANK, 0)
    assert layer.router.lambda_.item() == pytest.approx(1.5)
    _, routing = layer(tokens().float(), context_of(top_k=E))
    update_routers([layer.router], [[routing]], ONE_RANK, 1)
    assert layer.router.lambda_.item() == pytest.approx(1.0)


def test_bias_balancing_evens_the_load():
    layer = fresh_layer("bias_balanced", {"rate": 0.02})
    layer.router.weight.data[0] = 0.5

    def load() -> torch.Tensor:
        x_BSD = torch.cat([torch.randn(3, S, D - 1), torch.ones(3, S, 1)], -1)
        _, routing = layer(x_BSD, context_of())
        update_routers([layer.router], [[routing]], ONE_RANK, 0)
        return choices_per_expert(routing.expert_ids_TK, E).float() / routing.expert_ids_TK.numel()

    torch.manual_seed(0)
    early = torch.stack([load() for _ in range(20)]).mean(0)
    for _ in range(300):
        load()
    late = torch.stack([load() for _ in range(100)]).mean(0)
    assert (late - 1 / E).abs().max() < 0.5 * (early - 1 / E).abs().max()


def test_a_router_of_all_layers_is_owned_once():
    run = small_run(model={"n_layers": 4})
    moe = replace(run.moe, router=RouterConfig(name="omni", options={"group": 2}))
    model = TransformerXL(replace(run.model, vocab_size=11), moe, seed=1)
    routers = [layer.router for layer in model.moe_layers]
    assert routers[1].owner is routers[0].owner is routers[0]
    assert routers[3].owner is routers[2]
    named = [name for name, _ in model.named_parameters() if "router" in name]
    assert named == ["layers.0.moe.router.weight", "layers.2.moe.router.weight"]
    one = TransformerXL(
        replace(run.model, vocab_size=11), replace(moe, router=RouterConfig(name="omni")), seed=1
    )
    assert [name for name, _ in one.named_parameters() if "router" in name] == named[:1]
    ids_BS = torch.arange(16).view(2, 8) % 11
    one(ids_BS, ids_BS).loss_BS.mean().backward()
    assert torch.count_nonzero(one.moe_layers[0].router.weight.grad)


def test_one_hypernetwork_serves_all_layers():
    run = small_run(model={"n_layers": 3, "vocab_size": 11})
    options = {"shared": True, "hyper_size": 8, "start_std": 0.05}
    model = TransformerXL(run.model, replace(run.moe, router=RouterConfig(options=options)), seed=1)
    routers = [layer.router for layer in model.moe_layers]
    buffers = [name for name, _ in model.named_buffers() if "hypernet" in name]
    assert len(buffers) == 4
    assert all(name.startswith("layers.0.") for name in buffers)
    weights = [router.generate()[0] for router in routers]
    assert weights[0].std().item() == pytest.approx(0.05)
    assert not torch.allclose(weights[0], weights[1])
    weights[2].square().sum().backward()
    assert torch.count_nonzero(routers[2].embedding.grad)
    assert routers[0].embedding.grad is None


def test_experts_that_choose_are_balanced():
    for name in ("expert_choice", "base"):
        routing = route(build_layer(name).router, flat())
        for row in range(3):
            counts = choices_per_expert(routing.expert_ids_TK[row * S : (row + 1) * S], E)
            assert counts.unique().tolist() == [2 * S // E if name == "expert_choice" else S // E]


def test_the_transport_plan_is_balanced():
    z_TE, sequence_T = 3 * torch.randn(20, E).double() + torch.arange(E), torch.arange(20) // 10
    scores_TE = balanced(z_TE, sequence_T, torch.tensor([10, 10]), 200)
    plan_TE = scores_TE.softmax(-1)
    for row in range(2):
        torch.testing.assert_close(plan_TE[sequence_T == row].sum(0), torch.full((E,), 10 / E).double())


def test_equally_tight_clusters_are_not_scaled():
    firsts = torch.cat([torch.full((E, 1), 1 / E), torch.randn(E, D)], 1)
    spread_D = torch.rand(D) + 0.1
    seconds = torch.cat([torch.full((E, 1), 1 / E), (spread_D / E).expand(E, D)], 1)
    torch.testing.assert_close(tightness(firsts, seconds, 0.002), torch.ones(E, D))


def test_scales_of_clusters_are_inverse_to_their_spread():
    shares = torch.full((2, 1), 0.5)
    spread_ED = torch.tensor([[1.0, 0.4], [2.0, 0.8]])
    moments = torch.cat([shares, shares * spread_ED], 1)
    scales_ED = tightness(moments, moments, 0.002)
    torch.testing.assert_close(scales_ED[0] / scales_ED[1], torch.full((2,), 2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(scales_ED.mean(0), torch.ones(2))
    one_feature_larger = torch.cat([shares, shares * spread_ED * torch.tensor([50.0, 1])], 1)
    torch.testing.assert_close(tightness(moments, one_feature_larger, 0.002), scales_ED, rtol=1e-3, atol=0)


def test_an_empty_cluster_leaves_the_others_alone():
    shares = torch.tensor([[0.5], [0.5], [0.0]])
    spread_ED = torch.tensor([[1.0, 0.4], [2.0, 0.8], [0.0, 0.0]])
    moments = torch.cat([shares, shares * spread_ED], 1)
    scales_ED = tightness(moments, moments, 0.002)
    torch.testing.assert_close(scales_ED[:2], tightness(moments[:2], moments[:2], 0.002))
    assert scales_ED[2].tolist() == [1, 1]


def test_no_gradient_passes_through_the_scales():
    layer = build_layer("clustering", {"stats": "batch"})
    x_TD = flat().requires_grad_()
    route(layer.router, x_TD).weights_TK[0].square().sum().backward()
    assert torch.count_nonzero(x_TD.grad[0])
    assert not torch.count_nonzero(x_TD.grad[1:])


def constant_experts(layer: MoELayer, values: list[float]) -> None:
    layer.experts.w_out.data.zero_()
    layer.experts.b_out.data.copy_(torch.tensor(values)[:, None].expand(E, D))


def test_the_strongest_experts_win():
    layer = build_layer("compete", {"rate": 1.0})
    values = [0.1, 2.0, -1.0, 1.0]
    constant_experts(layer, values)
    y, routing = layer(tokens(), context_of())
    assert routing.expert_ids_TK.unique(dim=0).tolist() == [[1, 3]]
    strong, second = (math.log1p(math.exp(value)) for value in (2.0, 1.0))
    expected = torch.tensor([strong, second]).double() / (strong + second)
    torch.testing.assert_close(routing.weights_TK, expected.expand(24, 2))
    torch.testing.assert_close(y, torch.full_like(y, (2 * strong + second) / (strong + second)))


def test_distillation_teaches_the_router_alone():
    layer = build_layer("compete", {"rate": 1.0})
    _, routing = layer(tokens(), context_of())
    routing.losses["distill"].backward()
    assert torch.count_nonzero(layer.router.weight.grad)
    assert all(p.grad is None or not p.grad.any() for p in layer.experts.parameters())


def test_distillation_makes_the_router_foresee_the_winners():
    layer = build_layer("compete", {"rate": 1.0, "temperature": 0.02}).float()
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.05)

    def agreement() -> float:
        layer.eval()
        _, foreseen = layer(tokens(99).float(), context_of(top_k=1))
        layer.train()
        _, won = layer(tokens(99).float(), context_of(top_k=1))
        return (foreseen.expert_ids_TK == won.expert_ids_TK).float().mean().item()

    before = agreement()
    for step in range(300):
        _, routing = layer(tokens(step).float(), context_of())
        optimizer.zero_grad()
        routing.losses["distill"].backward()
        optimizer.step()
    assert agreement() > max(before + 0.2, 0.7)


def test_competitions_are_planned():
    steps, layers, rate = range(2 * BLOCK), range(6), 0.2
    plan = torch.tensor([[competes(s, depth, 7, rate, 100, 2) for depth in layers] for s in steps])
    assert not plan[:100].any()
    assert plan.sum(1).max() == 2
    assert plan.float().mean(0)[:2].tolist() == pytest.approx([rate, rate], abs=0.03)
    assert plan.sum() / plan.numel() == pytest.approx(rate, abs=0.03)
    free = torch.tensor([[competes(s, depth, 7, rate, 100, 0) for depth in layers] for s in steps])
    assert free.sum(1).max() > 2
    assert all(competes(s, 3, 7, 1.0, 0, 0) for s in range(50))
    assert not any(competes(s, 3, 7, 0.0, 0, 0) for s in range(50))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_similarity_is_one_for_equals_and_blind_to_rotation_scale_and_shift(kernel):
    x_NP = torch.randn(40, 6, generator=generator(1, "x"), dtype=torch.double)
    y_NP = torch.randn(40, 6, generator=generator(1, "y"), dtype=torch.double) + x_NP
    rotation_PP = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))[0]
    value = cka(x_NP, y_NP, kernel, 0.8)
    assert cka(x_NP, x_NP, kernel, 0.8).item() == pytest.approx(1)
    assert 0.1 < value.item() < 0.9
    torch.testing.assert_close(cka(y_NP, x_NP, kernel, 0.8), value)
    torch.testing.assert_close(cka(3 * x_NP @ rotation_PP + 5, y_NP, kernel, 0.8), value)


@pytest.mark.parametrize("n_tokens", [8, 16, 64])
def test_similarity_of_unrelated_features_is_zero_on_average(n_tokens):
    draws = generator(1, "unrelated", n_tokens)
    values = [
        cka(*torch.randn(2, n_tokens, 16, generator=draws, dtype=torch.double), "linear", 0.8).clamp(-2, 2)
        for _ in range(300)
    ]
    assert torch.stack(values).mean().item() == pytest.approx(0, abs=0.06)


def test_a_pair_is_checked_once_it_has_met_often_enough():
    layer = fresh_layer("similarity", {"frequency": 2.5})
    statistics = torch.zeros(1, E * E)
    statistics[0, 1] = 0.4  # the pair (0, 1)
    fired = []
    for step in range(30):
        if layer.router.due().tolist():
            fired.append(step)
        layer.router.update(statistics, step)
    period = math.floor(2.5 / 0.4) + 1
    assert fired == list(range(period, 30, period))[: len(fired)]
    assert len(fired) == 4


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_pairs_are_counted_for_every_token_that_chose_both(top_k):
    ids_TK = torch.rand(50, E, generator=generator(3, "pairs")).topk(top_k).indices
    expected_EE = torch.zeros(E, E)
    for chosen in ids_TK.tolist():
        for i, j in combinations(sorted(chosen), 2):
            expected_EE[i, j] += 1 / 50
    torch.testing.assert_close(pair_shares(ids_TK, E), expected_EE)


def test_similar_experts_are_pushed_apart():
    layer = build_layer("similarity", {"frequency": 0.01, "threshold": -1.0, "similarity_loss": 1.0}).float()
    for parameter in layer.experts.parameters():
        parameter.data[1:] = parameter.data[:1]
        parameter.data += 0.01 * torch.randn(
            parameter.shape, generator=generator(3, "moved", parameter.dim())
        )
    layer.router.table.fill_(1).triu_(1)
    optimizer = torch.optim.Adam(layer.experts.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        _, routing = layer(tokens().float(), context_of(top_k=E))
        optimizer.zero_grad()
        routing.losses["similarity"].backward()
        assert layer.router.weight.grad is None
        optimizer.step()
        values.append(routing.losses["similarity"].item())
    assert values[0] == pytest.approx(E * (E - 1) / 2, rel=0.05)
    assert values[-1] < 0.7 * values[0]


def test_stable_freezes_what_the_light_router_says():
    layer = fresh_layer("stable", {"stage_steps": 4})
    for step in range(4):
        assert not layer.router.frozen.item()
        learn(layer, tokens(step).float(), context_of(step=step))
    assert layer.router.frozen.item() == 1
    ids_TK = route(layer.router, flat().float(), step=4).expert_ids_TK
    layer.router.light_embedding.data.add_(3)
    layer.router.weight.data.mul_(-1)
    assert torch.equal(route(layer.router, flat(5).float(), step=5).expert_ids_TK, ids_TK)
    light_VE = fresh_layer("stable").router
    expected_VE = light_VE.light_embedding @ light_VE.light_weight.t()
    torch.testing.assert_close(layer.router.table, expected_VE)
    assert layer.router.table.shape == (V, E)


def passes(routing: Routing) -> torch.Tensor:
    return (routing.expert_ids_TK >= 0).sum(1)


def test_tokens_take_as_many_passes_as_their_gates_say():
    layer = build_layer("stratified", {"strata": (1, 1, 2)})
    x_BSD = torch.cat([tokens()[..., :-1], 30 * torch.ones(3, S, 1)], -1).double()
    for norm in layer.router.norms:
        norm.weight.data.fill_(1)
    for gates, expected in (([3, 2, 1], 1), ([0, 0, 0], 3)):
        for gate, place in zip(layer.router.gates, gates, strict=True):
            gate.data.zero_()
            gate.data[place, -1] = 100
        _, routing = layer(x_BSD, context_of(top_k=1))
        assert passes(routing).unique().tolist() == [expected]


def test_lower_strata_get_nothing_in_later_passes():
    layer = build_layer("stratified", {"strata": (2, 2)})
    _, routing = layer(tokens(), context_of())
    later = routing.expert_ids_TK[:, 2:]
    assert (later >= 0).any()
    assert later[later >= 0].min() >= 2


def test_stratified_without_experts_adds_nothing_and_is_balanced_at_one():
    layer = build_layer("stratified", {"strata": (E,)})
    for parameter in layer.experts.parameters():
        parameter.data.zero_()
    for gate in layer.router.gates:
        gate.data.zero_()
    y, routing = layer(tokens(), context_of())
    assert not y.any()
    assert routing.losses["strata"].item() == pytest.approx(1)


def test_all_units_are_the_dense_network():
    layer, dense = build_layer("topk"), build_layer("dense")
    router = layer.router
    dense.experts.w_in.data = router.w_in.data.view(E, F, D)
    dense.experts.b_in.data = router.b_in.data.view(E, F)
    dense.experts.w_out.data = router.w_out.data.view(D, E, F).transpose(0, 1)
    dense.experts.b_out.data = router.b_out.data.expand(E, D) / E
    y, _ = layer(tokens(), context_of(top_k=E))
    torch.testing.assert_close(y, dense(tokens(), context_of())[0])
    assert layer.experts is None
    less, _ = layer(tokens(), context_of(top_k=1))
    assert (y - less).abs().max() > 1e-3


def test_product_keys_find_the_largest_sums():
    router = build_layer("pkm", {"keys": 5, "heads": 3}).router
    scores_THK, places_THK = router.find(flat())
    n = router.n
    u_b = torch.einsum("td,hnd->thn", flat()[:, D // 2 :], router.keys_b)
    u_a = torch.einsum("td,hnd->thn", flat()[:, : D // 2], router.keys_a)
    best = (u_b[..., :, None] + u_a[..., None, :]).flatten(2).topk(5)
    torch.testing.assert_close(scores_THK, best.values)
    assert torch.equal(places_THK, best.indices)
    assert places_THK.max() < n * n <= E * F


def test_all_domains_start_as_the_shared_network():
    layer = fresh_layer("lms")
    y, _ = layer(tokens().float(), context_of())
    unknown, _ = layer(tokens().float(), replace(context_of(), domain_T2=None))
    assert torch.equal(y, unknown)
    added = sum(getattr(layer.router, name).numel() for name in layer.router.undecayed)
    assert added == 2 * (2 + 1) * 32 * (D + E * F)


def test_domains_have_matrices_of_their_own():
    layer, context = build_layer("lms").eval(), replace(context_of(), route_T=None)
    y, _ = layer(tokens(), context)
    layer.router.v_in.data[1] += 1
    changed, _ = layer(tokens(), context)
    sources = context.domain_T2[:, 0].view(3, S)
    moved = (y - changed).abs().amax(-1) > 1e-9
    assert torch.equal(moved, sources == 1)


def test_low_rank_matrices_do_not_decay():
    run = small_run()
    moe = replace(run.moe, router=RouterConfig(name="lms"))
    model = TransformerXL(replace(run.model, vocab_size=11), moe, seed=1)
    groups = {group["role"]: group["params"] for group in parameter_groups(model, 0.1)}
    router = model.moe_layers[0].router
    assert any(p is router.w_in for p in groups["router_decay"])
    assert any(p is router.v_in for p in groups["router_no_decay"])
    assert not any(p is router.u_out for p in groups["router_decay"])
