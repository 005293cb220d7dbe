"""From defaults, preset, file and overrides to one checked run."""

import json

import pytest

from megamoe.config.load import from_dict, load_config
from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError


def test_later_layers_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[moe]\ntop_k = 3\n[training]\nseed = 5\n")
    run = load_config(preset="small_enwik8", file=file, overrides=["training.seed=7"])
    assert (run.model.n_layers, run.moe.top_k, run.training.seed) == (4, 3, 7)


def test_written_config_reads_back_equal(tmp_path):
    run = load_config(preset="xl_wikitext103", overrides=["moe.ep_size=4", "evaluation.top_ks=1,2"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(run.to_dict()))
    assert load_config(file=file) == run == from_dict(run.to_dict())


@pytest.mark.parametrize(
    ("override", "section", "field", "expected"),
    [
        ("training.max_steps=1e3", "training", "max_steps", None),
        ("optimizer.lr=1e-3", "optimizer", "lr", 1e-3),
        ("optimizer.betas=0.9,0.95", "optimizer", "betas", (0.9, 0.95)),
        ("model.cutoffs=[10, 30]", "model", "cutoffs", (10, 30)),
        ("model.cutoffs=", "model", "cutoffs", ()),
        ("model.pre_norm=True", "model", "pre_norm", True),
        ("moe.ep_size=auto", "moe", "ep_size", "auto"),
        ("moe.ep_size=2", "moe", "ep_size", 2),
        ("evaluation.memory_len=0", "evaluation", "memory_len", 0),
    ],
)
def test_override_strings_become_typed_values(override, section, field, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="whole number"):
            load_config(overrides=[override])
        return
    value = getattr(getattr(load_config(overrides=[override]), section), field)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.topk=3", r"moe\.topk = '3': unknown key, did you mean 'top_k'\?"),
        ("mode.n_layers=3", r"mode = .*did you mean 'model'\?"),
        ("model=3", "model = '3': is a section"),
        ("moe.router.options={}", r"moe\.router\.options = .* set one of them as moe.router.NAME"),
        ("model.n_layers.x=3", r"model\.n_layers = .*expected a number"),
        ("model.n_layers=0", r"model\.n_layers = 0: give a number above 0"),
        ("model.n_layers=2.5", r"model\.n_layers = '2\.5': expected a whole number"),
        ("model.pre_norm=yes", "expected true or false"),
        ("model.dropout=1", r"model\.dropout = 1\.0"),
        ("model.d_model=7", r"model\.d_model = 7"),
        ("model.cutoffs=30,10", r"model\.cutoffs = \(30, 10\)"),
        ("moe.top_k=17", r"moe\.top_k = 17: stay at or below moe\.n_experts = 16"),
        ("moe.ep_size=3", r"moe\.ep_size = 3: give a divisor"),
        ("moe.ep_size=many", r"moe\.ep_size = 'many': expected int or auto"),
        ("moe.layers=0,9", r"moe\.layers = '0,9': name layers 0 to 3"),
        ("moe.layers=first", r"moe\.layers = 'first'"),
        ("moe.schedule.mode=liner_increase", "did you mean 'linear_increase'"),
        ("optimizer.betas=0.9", "expected 2 numbers"),
        ("optimizer.lr=nan", r"optimizer\.lr = 'nan': expected a finite number"),
        ("training.grad_clip=inf", r"training\.grad_clip = 'inf': expected a finite number"),
        ("optimizer.min_lr=1", r"optimizer\.min_lr = 1\.0: stay at or below optimizer\.lr = 0\.00025"),
        ("name=../elsewhere", r"name = '\.\./elsewhere': name a folder below output_dir"),
        ("name=/elsewhere", r"name = '/elsewhere': name a folder below output_dir"),
        ("data.dataset=enwik9", "did you mean 'enwik8'"),
        ("seed", "write it as section.key=value"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)


def test_schedule_may_not_ask_for_more_experts_than_there_are():
    with pytest.raises(ConfigError, match=r"moe\.schedule\.max_k = 16"):
        load_config(preset="small_enwik8", overrides=["moe.n_experts=8"])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'small_enwik8'"):
        load_config(preset="small_enwiki8")


@pytest.mark.parametrize(("name", "text"), [("a.toml", "x ="), ("a.json", "[1]"), ("a.json", "{")])
def test_broken_config_file_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"config file"):
        load_config(file=tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file=tmp_path / "missing.toml")


def test_choosing_another_router_drops_the_options_of_the_first():
    run = load_config(preset="small_enwik8", overrides=["moe.router.name=smoe"])
    assert (run.moe.router.name, dict(run.moe.router.options)) == ("smoe", {})
    run = load_config(preset="small_enwik8", overrides=["moe.router.name=hyper"])
    assert dict(run.moe.router.options) == {"hyper_size": 256}


def test_both_spellings_of_a_router_option_are_one(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"moe": {"router": {"options": {"hyper_size": 8}}}}))
    assert load_config(preset="small_enwik8", file=file).moe.router.options["hyper_size"] == 8
    run = load_config(file=file, overrides=["moe.router.hyper_size=9"])
    assert run.moe.router.options["hyper_size"] == "9"


def test_layers_by_name_and_by_index():
    assert RunConfig().moe.layer_indices(3) == (0, 1, 2)
    assert load_config(overrides=["moe.layers=none"]).moe.layer_indices(3) == ()
    assert load_config(overrides=["moe.layers=2,0,2"]).moe.layer_indices(3) == (0, 2)
