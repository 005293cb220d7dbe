"""The README's commands, as a newcomer types them: the demo trains and learns, and what it names works."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megamoe
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.data.corpus import load_corpus
from megamoe.data.ngrams import cross_entropy
from megamoe.models.transformer_xl import TransformerXL
from tests.environment import environment
from tests.launchers import require_mpirun
from tests.processes import free_port

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line)
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
FOLLOW_UPS = [command for command in COMMANDS if command.startswith(".venv/bin/")]
LAUNCHES = [command for command in COMMANDS if " train " in command]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The repository as links, so that a run writes nothing into it."""
    folder = tmp_path_factory.mktemp("workspace")
    for path in REPOSITORY.iterdir():
        if path.name not in (".git", ".venv", "runs"):
            (folder / path.name).symlink_to(path)
    installed = folder / ".venv"
    installed.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".installed":
            (installed / path.name).symlink_to(path)
    # Newer than what it is made from, so that make does not make another.
    (installed / ".installed").touch()
    return folder


def run(workspace, command, environment=None):
    done = subprocess.run(
        shlex.split(command), cwd=workspace, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(workspace):
    assert "make demo" in COMMANDS
    output = run(workspace, "make demo")
    return workspace / "runs/demo", output


def test_it_learns_more_than_letter_triples(demo):
    folder, output = demo
    results = json.loads((folder / "results.json").read_text())
    corpus = load_corpus(CheckpointReader(folder / "best").config.data)
    order_2 = cross_entropy(corpus.tokens["train"], corpus.tokens["test"], corpus.vocab_size, order=2)
    assert results["corpus"] == "enwik8-sample (true bytes)"
    assert set(results["bpc_by_k"]) == {"1", "2", "4", "8", "16"}
    assert results["bpc_by_k"]["16"] < order_2
    assert f"{results['bpc_by_k']['16']:.4f}" in output


def test_it_leaves_the_documented_folder(demo):
    folder, _ = demo
    for name in ("config.json", "ds_config.json", "environment.json", "metrics.jsonl", "train.log", "best"):
        assert (folder / name).exists()
    assert (folder / "plots/curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines]


def test_the_embedding_has_learned_and_the_hypernetwork_has_not_moved_by_a_bit(demo):
    folder, _ = demo
    config = CheckpointReader(folder / "best").config
    start = TransformerXL(config.model, config.moe, seed=config.training.seed)
    trained = megamoe.load_model(folder)
    trained_buffers = dict(trained.named_buffers())
    hypernets = {name: value for name, value in start.named_buffers() if "hypernet" in name}
    assert len(hypernets) == 4 * len(start.moe_layers)
    for name, value in hypernets.items():
        assert torch.equal(value, trained_buffers[name])
    for before, after in zip(start.moe_layers, trained.moe_layers, strict=True):
        assert not torch.equal(before.router.embedding, after.router.embedding)
    another = TransformerXL(config.model, config.moe, seed=config.training.seed + 1)
    drawn = "layers.0.moe.router.hypernet_w_in"
    assert not torch.equal(hypernets[drawn], dict(another.named_buffers())[drawn])


@pytest.mark.parametrize("command", FOLLOW_UPS)
def test_follow_up(demo, workspace, command):
    assert run(workspace, command).strip()


SMALL = (
    "training.max_steps=2 training.batch_size=4 model.n_layers=1 moe.layers=0 model.d_model=32"
    " model.n_heads=2 model.d_head=16 moe.d_expert=16 model.segment_len=16 model.memory_len=16"
    " evaluation.batch_size=50 evaluation.segment_len=64 evaluation.top_ks=1"
)


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_line(workspace, command):
    """As it stands, but for a smaller model, fewer processes than a cluster has, and a free port."""
    name = f"launched{LAUNCHES.index(command)}"
    command = re.sub(r"(--nproc_per_node|--num_gpus) \d+", rf"--master_port {free_port()} \1 2", command)
    if command.startswith("mpirun "):
        command = command.replace("mpirun", shlex.join(require_mpirun()), 1)
    output = run(workspace, f"{command} {SMALL} name={name}", environment())
    assert "step 2/2" in output


def test_the_readme_names_them_all():
    assert len(FOLLOW_UPS) >= 6
    assert len(LAUNCHES) >= 3
