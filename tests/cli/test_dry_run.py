"""``megamoe train --dry-run``: what it shows is what a run does, and it leaves everything as it is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamoe.cli import main
from megamoe.moe.routers.registry import BUILT_IN, router_class
from megamoe.training.lock import RunLock
from tests.cli.conftest import CONFIG, Done, on_two_ranks
from tests.cli.test_cli import refusal

RUN = ("train", "--config", "toy.toml", "--dry-run")


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy run's config and text, where commands are given."""
    (tmp_path / "toy.toml").write_text(CONFIG)
    (tmp_path / "data").symlink_to(project / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """The command in this process, which belongs to no process group afterwards."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert not dist.is_initialized()
    return Done(code, captured.out, captured.err)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    done = command(capsys, *arguments, "--json")
    assert done.code == 0, done.errors
    return json.loads(done.output)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of all files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_cluster_without_the_cluster(tmp_path, monkeypatch, capsys):
    """1.2 billion parameters on 1024 GPUs, as rank 130 has them."""
    monkeypatch.chdir(tmp_path)
    preset = (
        "train",
        "--preset",
        "xl_enwik8",
        "training.batch_size=2048",
        "--dry-run",
        "--world-size",
        "1024",
    )
    found = report(capsys, *preset, "--rank", "130", "--device", "cuda")
    assert found["layout"] == {
        "world_size": 1024, "ep_size": 128, "micro_batch_size": 2, "accumulation": 1, "zero_stage": 1,
        "dtype": "bfloat16",
    }  # fmt: skip
    groups = found["groups"]
    assert {name: (len(ranks), len(ranks[0])) for name, ranks in groups.items()} == {
        "data parallel": (1, 1024),
        "expert parallel": (8, 128),
        "expert data parallel": (128, 8),
    }
    assert groups["expert parallel"][1] == list(range(128, 256))
    assert groups["expert data parallel"][2] == [2, 130, 258, 386, 514, 642, 770, 898]
    held, whole = found["held"], found["parameters"]
    assert (held["experts"], held["streams"]) == ([2], [260, 261])
    assert held["parameters"]["experts"] * 128 == whole["experts"] == 8 * 128 * (2 * 1024 * 512 + 512 + 1024)
    assert held["parameters"]["trainable"] == whole["trainable"] - whole["experts"] * 127 // 128
    assert found["device"] == "cuda" and "reduce_bucket_size" not in found["ds_config"]["zero_optimization"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_groups(here, capsys):
    done = command(capsys, *RUN, "training.batch_size=64", "--world-size", "64", "--rank", "5")
    assert done.code == 0, done.errors
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines()]
    assert [row for row in rows if row] == [
        ["data parallel", "1", "64", "0-63"],
        ["expert parallel", "16", "4", "0-3; 4-7; ...; 60-63"],
        ["expert data parallel", "4", "16",
         "0, 4, ..., 60; 1, 5, ..., 61; 2, 6, ..., 62; 3, 7, ..., 63"],
    ]  # fmt: skip
    rank, experts, streams = (line.strip() for line in done.output.splitlines()[-3:])
    one_expert_of_two_layers = 2 * (2 * 16 * 8 + 8 + 16)
    assert rank.startswith("rank 5 ") and rank.endswith(f" {one_expert_of_two_layers} of them in experts")
    assert (experts, streams) == ("expert ids  1 in each mixture layer", "stream ids  5 in each batch")
    assert {path.name for path in here.iterdir()} == {"toy.toml", "data"}


@pytest.mark.distributed
def test_configs_and_banner_are_those_of_a_real_run(launched, project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    run = project / "runs/toy"
    recorded = {name: json.loads((run / name).read_text()) for name in ("config.json", "ds_config.json")}
    steps = recorded["config.json"]["training"]["max_steps"]  # another test goes on with the run
    before = contents(run)
    done = command(
        capsys, *RUN, "--world-size", "2", "--deepspeed_config", "fp32.json", f"training.max_steps={steps}",
        "--output", str(tmp_path / "plan"),
    )  # fmt: skip
    assert done.code == 0, done.errors
    assert {path.name: json.loads(path.read_text()) for path in (tmp_path / "plan").iterdir()} == recorded
    shown = [line.rstrip() for line in done.output.splitlines()]
    assert shown[0].startswith("run ") and f"(resuming at step {steps}, {steps} steps)" in shown[0]
    rows = shown[1 : shown.index("")]
    assert len(rows) >= 9
    assert not [row for row in rows if row not in launched.output]
    assert any(row.startswith("finished ") for row in shown)
    again = report(
        capsys, "train", "--config", str(tmp_path / "plan/config.json"), "--dry-run", "--world-size", "2",
        "--deepspeed_config", str(tmp_path / "plan/ds_config.json"),
    )  # fmt: skip
    assert {"config.json": again["config"], "ds_config.json": again["ds_config"]} == recorded
    changed = command(capsys, *RUN, "--world-size", "2", "training.max_steps=99", "optimizer.lr=1")
    assert f" optimizer.lr 0.00025 -> 1.0; training.max_steps {steps} -> 99 (since runs/toy/config.json)" in (
        " ".join(changed.output.split())
    )
    assert contents(run) == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("moe.d_expert=9", "moe.d_expert = 9: checkpoint 'runs/toy"),
        ("training.batch_size=2", "training.batch_size = 2: checkpoint 'runs/toy"),
        ("name=toy checkpoint.resume=never", "checkpoint.resume = 'never': runs/toy holds a run"),
        ("name=toy training.max_steps=3", "training.max_steps = 3: checkpoint 'runs/toy"),
        ("name=toy training.max_steps=99 --output runs/toy/plan", "--output = 'runs/toy/plan': lies in the"),
    ],
)  # fmt: skip
def test_refusals_of_a_checkpoint(arguments, message, launched, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    before = contents(project / "runs/toy")
    elsewhere = ("name=other", "checkpoint.resume=runs/toy") if "name=" not in arguments else ()
    done = command(capsys, *RUN, "--world-size", "2", *elsewhere, *arguments.split())
    assert refusal(done).startswith(message)
    assert contents(project / "runs/toy") == before
    assert not (project / "runs/other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--world-size 3", "training.batch_size = 4: give a multiple of the 3 ranks, or start 2 of them"),
        (
            "--world-size 6 training.batch_size=6 moe.n_experts=8 moe.ep_size=4",
            "moe.ep_size = 4: does not divide the 6 ranks; give 1, 2 or auto",
        ),
        (
            "--world-size 2 moe.n_experts=12 moe.ep_size=6",
            "moe.ep_size = 6: there are only 2 ranks; give 1, 2 or auto",
        ),
        ("--world-size 2 --rank 2", "rank 2 of 2: give 1 or more ranks, and one of them"),
        ("--world-size 0", "rank 0 of 0: give 1 or more ranks, and one of them"),
        ("training.micro_batch_size=3", "training.batch_size = 4: is not 3 (micro-batch) * 1"),
        ("moe.router.name=dense moe.z_loss=0.1", "moe.z_loss = 0.1: set it to 0, policy 'dense'"),
        ("moe.router.name=expert_choice", "moe.router.name = 'expert_choice': its choices depend on later"),
        ("moe.router.name=gshard moe.n_experts=1 moe.top_k=1", "moe.n_experts = 1: policy 'gshard' needs 2"),
        ("evaluation.top_ks=64", "evaluation.top_ks = (64,): name a k up to moe.n_experts = 4"),
        ("evaluation.batch_size=9999", "evaluation.batch_size = 9999: leaves no token to predict"),
        ("training.batch_size=2048 --world-size 2048", "valid split of the fox (true bytes): "),
        ("data.path=elsewhere", "data.path = 'elsewhere': "),
        ("output_dir=toy.toml", "output_dir = 'toy.toml': cannot be written"),
        ("checkpoint.resume=missing", "checkpoint 'missing': there is none"),
        ("--profile", "--dry-run and --profile: give one of them"),
    ],
)
def test_refusals(arguments, message, here, capsys):
    done = command(capsys, *RUN, *arguments.split())
    assert refusal(done).startswith(message)
    assert {path.name for path in here.iterdir()} == {"toy.toml", "data"}


@pytest.mark.parametrize("option", ["--world-size 2", "--rank 0", "--device cpu", "--output plan", "--json"])
def test_what_belongs_to_a_dry_run_does_nothing_without(option, here, capsys):
    done = command(capsys, "train", "--config", "toy.toml", *option.split())
    assert refusal(done) == f"{option.split()[0]}: belongs to --dry-run; give that too"


def test_text_that_is_elsewhere(here, capsys):
    done = command(capsys, *RUN, "data.path=elsewhere")
    assert refusal(done).endswith("; a dry run can do without if model.vocab_size is set")
    done = command(capsys, *RUN, "data.path=elsewhere", "model.vocab_size=300")
    assert done.code == 0, done.errors
    (row,) = (line for line in done.output.splitlines() if line.startswith("corpus "))
    assert "not read (data.path = 'elsewhere': " in row


def test_a_run_folder_in_use(here, capsys):
    folder = here / "runs/toy"
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    before = contents(folder)
    done = command(capsys, *RUN)
    lock.release()
    assert f"runs/toy is being written by process {os.getpid()} on " in done.output
    assert contents(folder) == before


@pytest.mark.parametrize("policy", BUILT_IN)
def test_every_policy(policy, here, capsys):
    arguments = (f"moe.router.name={policy}", "evaluation.allow_noncausal=true")
    found = report(
        capsys, *RUN, *arguments, "--world-size", "4", "data.path=elsewhere", "model.vocab_size=256"
    )
    has_experts = not router_class(policy).owns_feed_forward
    assert ("expert parallel" in found["groups"], found["held"]["experts"] == [0]) == (
        has_experts,
        has_experts,
    )


@pytest.mark.distributed
def test_one_process_of_a_launcher_speaks_for_all(here):
    done = on_two_ranks("by hand", *RUN, folder=here)
    assert done.code == 0, done.errors
    assert done.output.count("2 data-parallel ranks on cpu") == 1
    assert {path.name for path in here.iterdir()} == {"toy.toml", "data"}
