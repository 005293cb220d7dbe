"""The command line without training: help, lists, and refusals of every kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.cli import COMMANDS, main
from megamoe.config import from_dict
from megamoe.config.presets import PRESETS, preset_values
from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.moe.routers import available
from tests.cli.conftest import CONFIG, Done, megamoe


def refusal(done: Done) -> str:
    """The one line of a refusal."""
    assert done.code == 2, done
    assert done.output == ""
    assert done.errors.startswith("megamoe: error: ")
    assert done.errors.count("\n") == 1
    return done.errors.removeprefix("megamoe: error: ").rstrip("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n" in text
    assert f"megamoe {command}" in text.partition("examples:")[2]


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)


def test_config_prints_what_a_run_would_use(capsys):
    assert main(["config", "--preset", "tiny_enwik8", "moe.top_k=3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["moe"]["top_k"] == 3
    assert from_dict(printed).model == from_dict(preset_values("tiny_enwik8")).model


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("--preset small_enwik8", "runs/small_enwik8-hyper"),
        ("--preset small_enwik8 moe.router.name=smoe output_dir=/big", "/big/small_enwik8-smoe"),
        ("name=mine/first --deepspeed_config ds_configs/zero1_bf16.json", "runs/mine/first"),
    ],
)
def test_config_names_the_folder_of_a_run(words, folder, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["config", "--run-folder", *words.split()]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_config_prints_the_reference_of_options(capsys):
    assert main(["config", "--reference"]) == 0
    documented = Path(__file__).parents[2] / "docs/configuration.md"
    assert capsys.readouterr().out == documented.read_text(encoding="utf-8")


def test_routers_are_listed_and_shown(capsys):
    assert main(["routers"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in available())
    assert main(["routers", "hyper"]) == 0
    shown = capsys.readouterr().out
    assert "O = reshape(W2 relu(W1 e + b1) + b2" in shown
    assert "moe.router.hyper_size=256" in shown


def test_env_prints_a_table_or_json(capsys):
    assert main(["env"]) == 0
    assert "\npackages " in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["deepspeed"]


@pytest.mark.parametrize(
    "arguments",
    [
        "presets",
        "config --preset tiny_enwik8",
        "config --preset tiny_enwik8 --run-folder",
        "train --preset tiny_enwik8 moe.topk=3",
        "evaluate",
        "generate runs/demo --prompt a --temperature -1",
        "train --help",
    ],
)
def test_quick_answers_import_no_torch(arguments):
    code = (
        "import sys\nfrom megamoe.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "argument COMMAND: invalid choice: 'frobnicate'"),
        ("presets x=1", "'x=1': unknown argument; see megamoe --help"),
        ("train --presets tiny_enwik8", "'--presets': unknown argument"),
        ("train --preset tiny_enwik", "preset = 'tiny_enwik': unknown, did you mean 'tiny_enwik8'?"),
        ("train --config missing.toml", "config file 'missing.toml': cannot be read"),
        ("train --preset tiny_enwik8 moe.topk=2", "moe.topk = '2': unknown key, did you mean 'top_k'?"),
        ("train --preset tiny_enwik8 top_k", "override 'top_k': write it as section.key=value"),
        ("train --preset tiny_enwik8 moe.top_k=99", "moe.top_k = 99: stay at or below moe.n_experts = 16"),
        ("train --preset tiny_enwik8 moe.ep_size=3", "moe.ep_size = 3: give a divisor of moe.n_experts = 16"),
        ("train --deepspeed_config missing.json", "config file 'missing.json': cannot be read"),
    ],
)  # fmt: skip
def test_refusals_of_the_config(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(arguments.split())
    captured = capsys.readouterr()
    assert refusal(Done(code, captured.out, captured.err)).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("moe.router.name=hypr", "moe.router.name = 'hypr': unknown policy, did you mean 'hyper'?"),
        ("data.path=missing", "data.path = 'missing': "),
        ("training.micro_batch_size=3", "training.batch_size = 4: is not 3 (micro-batch) * 1"),
        ("evaluation.batch_size=9999", "evaluation.batch_size = 9999: leaves no token to predict"),
        ("evaluation.same_length=true evaluation.memory_len=0", "evaluation.same_length = True: evaluation."),
        ("moe.router.name=dense moe.z_loss=0.1", "moe.z_loss = 0.1: set it to 0, policy 'dense'"),
    ],
)  # fmt: skip
def test_refusals_before_anything_is_written(arguments, message, project, tmp_path):
    (tmp_path / "toy.toml").write_text(CONFIG)
    (tmp_path / "data").symlink_to(project / "data")
    done = megamoe("train", "--config", "toy.toml", *arguments.split(), folder=tmp_path)
    assert refusal(done).startswith(message)
    assert {path.name for path in tmp_path.iterdir()} == {"toy.toml", "data"}


def test_what_deepspeed_refuses_leaves_nothing(project, tmp_path):
    (tmp_path / "fp8.json").write_text('{"train_batch_size": "auto", "communication_data_type": "fp8"}')
    arguments = ("--config", "toy.toml", "--deepspeed_config", str(tmp_path / "fp8.json"))
    done = megamoe("train", *arguments, f"output_dir={tmp_path / 'runs'}", folder=project)
    assert refusal(done).startswith("the DeepSpeed config is refused by DeepSpeed: ")
    assert not any((tmp_path / "runs").glob("*/config.json"))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("runs/toy/checkpoints/step-000000006", "moe.d_expert = 9: checkpoint 'runs/toy"),
        ("missing", "checkpoint 'missing': there is none"),
    ],
)  # fmt: skip
def test_refusals_of_a_wrong_checkpoint(checkpoint, message, launched, project):
    changes = ("name=other", "moe.d_expert=9", f"checkpoint.resume={checkpoint}")
    done = megamoe("train", "--config", "toy.toml", *changes, folder=project)
    assert refusal(done).startswith(message)
    assert not (project / "runs/other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=other", "data: checkpoint 'runs/toy/checkpoints/step-00000000"),
        ("training.max_steps=3", "training.max_steps = 3: checkpoint 'runs/toy/checkpoints/step-00000000"),
        ("model.segment_len=7", "model.segment_len = 7: checkpoint 'runs/toy/checkpoints/step-00000000"),
    ],
)
def test_a_run_folder_goes_on_with_its_own_run_alone(change, message, launched, project):
    if not (project / "other").exists():
        text = project / "dog.txt"
        text.write_text("A lazy dog sleeps.\n" * 300)
        prepare(open_text([text], "the dog", by_lines=False), project / "other", "bytes")
    config = (project / "runs/toy/config.json").read_text()
    assert refusal(megamoe("train", "--config", "toy.toml", change, folder=project)).startswith(message)
    assert (project / "runs/toy/config.json").read_text() == config


def test_refusals_of_evaluate(launched, project):
    done = megamoe("evaluate", "runs/toy/best", "model.d_model=3", folder=project)
    assert refusal(done) == "model: belongs to the trained model; set data.* and evaluation.* only"
    done = megamoe("evaluate", "runs/toy/best", "evaluation.every=3", folder=project)
    assert refusal(done) == "evaluation.every: belongs to training; here the whole split is scored once"
    damaged = project / "damaged"
    damaged.mkdir(exist_ok=True)
    assert refusal(megamoe("evaluate", "damaged", folder=project)).startswith(
        "checkpoint 'damaged': there is none"
    )
