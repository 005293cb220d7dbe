"""What an equal budget gives each policy."""

from dataclasses import replace

import pytest

from megamoe.compare.contestants import contestants, mean_experts
from megamoe.config import RunConfig, load_config
from megamoe.errors import ConfigError
from megamoe.models.model_of import model_of
from megamoe.models.parameter_counts import parameter_counts

CONSTANT = ("moe.schedule.mode=constant", "moe.top_k=4", "training.max_steps=600")


def base_run(*overrides: str) -> RunConfig:
    run = load_config(preset="tiny_enwik8", overrides=[*CONSTANT, *overrides])
    return replace(run, name="compare", model=replace(run.model, vocab_size=256))


def test_equal_tokens_are_equal_steps_and_sizes():
    found = contestants(base_run(), ["hyper", "smoe", "switch", "relu"], "tokens")
    assert {one.run.training.max_steps for one in found} == {600}
    assert {one.run.moe.d_expert for one in found} == {32}
    assert [one.experts_computed for one in found] == [4, 4, 1, None]
    for one in found:
        assert one.parameters == parameter_counts(model_of(one.run))
        seeded = one.seeded(7)
        assert seeded.name == f"compare/{one.label}-seed7"
        assert replace(seeded, name="compare", training=one.run.training) == one.run
        assert seeded.training.seed == 7


def test_equal_flops_are_more_steps_for_those_who_compute_less():
    routers = ["smoe", "switch", "gshard", "dense", "compete:rate=0.3", "expert_choice:capacity=2"]
    run = base_run("evaluation.allow_noncausal=true")
    found = {one.label: one for one in contestants(run, routers, "flops")}
    steps = {label: one.run.training.max_steps for label, one in found.items()}
    assert steps["smoe"] == 600
    assert steps["switch"] == 2400
    assert steps["gshard"] == 1200
    assert steps["dense"] == 150
    assert steps["compete:rate=0.3"] == round(600 * 4 / (4 + 0.3 * 16 / 3))
    assert steps["expert_choice:capacity=2"] == 1200
    spent = [one.experts_computed * steps[label] for label, one in found.items()]
    assert max(spent) - min(spent) <= 16


def test_a_growing_k_is_averaged():
    run = base_run("moe.schedule.mode=linear_increase", "moe.schedule.min_k=4", "moe.schedule.max_k=16")
    smoe, switch = contestants(run, ["smoe", "switch"], "flops")
    assert smoe.experts_computed == pytest.approx(10, abs=0.1)
    assert smoe.run.training.max_steps == 600
    assert switch.run.training.max_steps == pytest.approx(6000, abs=60)
    assert mean_experts(switch.run) == 1


def test_equal_parameters_are_wider_or_narrower_experts():
    run = base_run()
    found = contestants(run, ["stable", "hyper", "cosine", "smoe_dropout"], "parameters")
    target = found[0].parameters.trainable
    per_unit = run.model.n_layers * run.moe.n_experts * (2 * run.model.d_model + 1)
    for one in found:
        assert abs(one.parameters.trainable - target) <= per_unit / 2
        assert one.run.training.max_steps == 600
    assert found[0].run.moe.d_expert == 32
    assert found[3].run.moe.d_expert > 32


def test_options_follow_the_name_and_those_of_the_preset_stay():
    given, other = contestants(base_run(), ["hyper", "compete:rate=0.5:response=norm"], "tokens")
    assert given.run.moe.router.options == {"hyper_size": 64}
    assert other.run.moe.router.options == {"rate": "0.5", "response": "norm"}
    (stratified,) = contestants(base_run(), ["stratified:strata=4+12"], "tokens")
    assert stratified.run.moe.router.options == {"strata": "4,12"}
    assert other.slug == "compete_rate=0.5_response=norm"


@pytest.mark.parametrize(
    ("routers", "budget", "message"),
    [
        (["hyper", "smoo"], "tokens", "moe.router.name = 'smoo': unknown policy, did you mean 'smoe'"),
        (["switch:capacity=2"], "tokens", "moe.router.capacity = '2': unknown key"),
        (["smoe", "smoe"], "tokens", "--routers: 'smoe' is named twice"),
        (
            ["expert_choice"],
            "tokens",
            "moe.router.name = 'expert_choice': its choices depend on",
        ),
        (["smoe", "relu"], "flops", "--budget = 'flops': how many experts 'relu' computes is not known"),
        (["stratified:strata=3+3"], "tokens", "moe.router.strata = (3, 3): give numbers above 0 that sum to"),
    ],
)
def test_what_does_not_fit_is_refused(routers, budget, message):
    with pytest.raises(ConfigError) as error:
        contestants(base_run(), routers, budget)
    assert str(error.value).startswith(message)
