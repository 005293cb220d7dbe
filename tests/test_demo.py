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


@pytest.mark.usefixtures("demo")
def test_its_experts_fit_into_fewer_bytes(workspace):
    """All ways of loading give one figure, and to keep everything changes none."""
    tool = ".venv/bin/python tools/compress_checkpoint.py runs/demo/best --json --score --max-tokens 8192"
    half = json.loads(run(workspace, f"{tool} runs/half --method resmoe --residual svd --keep 0.5"))
    assert half["bytes"]["after"]["experts"] < 0.6 * half["bytes"]["before"]["experts"]
    assert half["resident_bytes"]["factored"] < half["resident_bytes"]["restore"]
    whole = json.loads(run(workspace, f"{tool} runs/whole --method resmoe --keep 1"))
    for name, close in (("half", 0.5), ("whole", 1e-5)):
        scores = {"half": half, "whole": whole}[name]["scores"]
        before, after = scores["before"]["bpc_by_k"], scores["after"]["bpc_by_k"]
        assert before.keys() == after.keys() == {"1", "2", "4", "8", "16"}
        assert all(abs(before[k] - after[k]) < close for k in before), name
    figures = [
        json.loads(
            run(
                workspace,
                f".venv/bin/megamoe evaluate runs/half --json --experts {mode} evaluation.top_ks=2,16",
            )
        )
        for mode in ("restore", "on_the_fly", "factored")
    ]
    assert figures[1]["bpc_by_k"] == pytest.approx(figures[0]["bpc_by_k"], abs=1e-5)
    assert figures[2]["bpc_by_k"] == pytest.approx(figures[0]["bpc_by_k"], abs=1e-5)


@pytest.mark.usefixtures("demo")
def test_it_serves_the_same_from_few_experts(workspace):
    """From a predictor of its own routings to texts and figures, with a part of the experts in memory."""
    megamoe_in = ".venv/bin/megamoe"
    small = "--tokens 40000 --epochs 2 --width 64"
    run(workspace, f"{megamoe_in} predict-experts runs/demo/best runs/guesses {small}")
    texts = [
        run(
            workspace, f'{megamoe_in} generate runs/demo/best --prompt "The " --max-new-tokens 40 --json{how}'
        )
        for how in ("", " --expert-budget 25%", " --expert-budget 25% --predictor runs/guesses")
    ]
    assert len({json.loads(text)["text"] for text in texts}) == 1
    bench = json.loads(
        run(
            workspace, f"{megamoe_in} serve-bench runs/demo/best --predictor runs/guesses --tokens 200 --json"
        )
    )
    rows = bench["rows"]
    assert {row["mode"] for row in rows} == {"resident", "ondemand", "hint", "oracle", "replace"}
    assert all(row["same"] for row in rows if row["mode"] != "replace")


@pytest.mark.usefixtures("demo")
def test_what_its_experts_do_is_asked(workspace):
    few = "--samples 30 --window 32 --shuffles 20 --partitions 5 --draws 1"
    run(
        workspace,
        f".venv/bin/python tools/analyze_modularity.py runs/demo/best --untrained --output runs/asked {few}"
        " --functions wikitext",
    )
    found = json.loads((workspace / "runs/asked/modularity.json").read_text())
    assert [checkpoint["step"] > 0 for checkpoint in found["checkpoints"]] == [False, True]
    assert found["functions"] == ["wikitext/markup", "wikitext/numbers", "wikitext/prose"]
    assert found["perturbation"].keys() == set(found["functions"])
    assert (workspace / "runs/asked/modularity.md").read_text()


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
