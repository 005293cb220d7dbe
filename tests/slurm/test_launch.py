"""Training through ``sbatch slurm/...``: preempted, crashed, on lost nodes, in chains and arrays, refused."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.training.metrics_file import read_metrics
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(1200)

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 240
STEPS = 240
TOY = shlex.split("""
    --deepspeed_config ds_configs/zero1_fp32.json
    model.n_layers=1 model.d_model=16 model.n_heads=2 model.d_head=8 model.d_inner=16 model.segment_len=16
    model.memory_len=16 moe.layers=0 moe.n_experts=4 moe.d_expert=8 moe.top_k=2 moe.schedule.mode=constant
    training.batch_size=4 evaluation.every=0 evaluation.batch_size=4 evaluation.top_ks=2
    data.dataset=text data.path=data/fox checkpoint.every=10 logging.every=1 logging.tensorboard=false
""")
# What the templates ask of a cluster with GPUs is asked of one core each.
ONE_TASK_EACH = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


@dataclass(frozen=True)
class Checkout:
    """A checkout of the project in which jobs are submitted: links, so that ours stays as it is."""

    folder: Path
    cluster: Cluster

    def sbatch(self, *words: str, **variables: str) -> str:
        return self.cluster.submit(*words, folder=self.folder, variables=variables)

    def log(self, job: str) -> str:
        return Path(self.cluster.job(job)["StdOut"]).read_text()

    def wait(self, job: str, state: str = "COMPLETED", restarts: int = 0) -> dict[str, str]:
        return self.cluster.wait(job, state, restarts=restarts, timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    for path in REPOSITORY.iterdir():
        if path.name not in (".git", ".venv", "runs", "data"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    text = folder / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 150)
    prepare(open_text([text], "the fox", by_lines=False), folder / "data/fox", "bytes")
    return Checkout(folder, cluster)


def figures(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step, each written once."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    by_step = {line["step"]: (line["train/loss"], line["train/grad_norm"]) for line in lines}
    assert [*by_step] == [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return by_step


def until_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(line["step"] >= step for line in read_metrics(run / "metrics.jsonl")):
        assert time.monotonic() < deadline, f"{run} has not come to step {step}"
        time.sleep(0.05)


def kill_a_rank(rank: int, run: str) -> None:
    """SIGKILL to the process of a rank, as the kernel does where memory is used up."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        words, settings = command.split(b"\0"), variables.split(b"\0")
        is_task = words[1:4] == [b"-m", b"megamoe", b"train"] and f"name={run}".encode() in words
        if is_task and f"SLURM_PROCID={rank}".encode() in settings:
            subprocess.run(["kill", "-KILL", entry.name], check=True)
            return
    raise AssertionError(f"no rank {rank} of {run}")


@pytest.fixture(scope="module")
def uncut(checkout: Checkout) -> Path:
    """A run on two nodes that nothing befalls."""
    job = checkout.sbatch(
        "--nodes=2",
        *ONE_TASK_EACH,
        "slurm/small_enwik8.sh",
        *TOY,
        f"training.max_steps={STEPS}",
        "name=uncut",
    )
    checkout.wait(job)
    return checkout.folder / "runs/uncut"


@dataclass(frozen=True)
class Eventful:
    """The same run, cut three times; `resumed` are the steps from which it went on."""

    run: Path
    jobs: list[str]
    log: str
    resumed: list[int]


@pytest.fixture(scope="module")
def eventful(checkout: Checkout, uncut: Path) -> Eventful:
    cluster, run = checkout.cluster, checkout.folder / "runs/eventful"
    words = (*ONE_TASK_EACH, "slurm/small_enwik8.sh", *TOY, f"training.max_steps={STEPS}", "name=eventful")
    job = checkout.sbatch("--nodes=2", *words)
    # Two failures lie behind it: another one without progress would be the last.
    (run / "jobs").mkdir(parents=True)
    (run / "jobs/failures").write_text("2\n")

    until_step(run, 40)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", folder=run)
    checkout.wait(job, "PENDING", restarts=1)
    cluster.wait(urgent)

    until_step(run, 100)
    kill_a_rank(1, "eventful")
    checkout.wait(job, "RUNNING", restarts=2)

    until_step(run, 160)
    cluster.fail_node("node2")
    checkout.wait(job, "PENDING", restarts=3)
    # It would wait for two nodes; its owner does not.
    log = checkout.log(job)
    cluster.run("scancel", job)
    smaller = checkout.sbatch("--nodes=1", *words)
    checkout.wait(smaller)
    cluster.repair_node("node2")

    log += checkout.log(smaller)
    resumed = [int(step) for step in re.findall(r"\(resuming at step (\d+),", log)]
    return Eventful(run, [f"{job}-0", f"{job}-1", f"{job}-2", f"{smaller}-0"], log, resumed)


def test_a_run_is_preempted_crashes_loses_a_node_and_ends(eventful: Eventful) -> None:
    assert len(eventful.resumed) == 3
    assert "stopped on a signal, all is saved: requeue" in eventful.log
    assert re.search(r"ended with (137|76): requeue", eventful.log)
    hosts = re.findall(r"^hosts +(.+)$", eventful.log, flags=re.MULTILINE)
    assert hosts == ["node1 node2", "node1 node2", "node1 node2", "node1"]
    assert json.loads((eventful.run / "results.json").read_text())["steps"] == STEPS


def test_nothing_is_lost_to_a_signal(eventful: Eventful) -> None:
    """It stops between checkpoints, with one of its own; a crash goes on from the last in its rhythm."""
    assert eventful.resumed[0] >= 40
    stopped = re.search(r"step +(\d+)/\d+ \| stopped on SIG(USR1|TERM)", eventful.log)
    assert stopped is not None
    assert eventful.resumed[0] == int(stopped[1])
    assert all(step % 10 == 0 for step in eventful.resumed[1:])


def test_losses_are_those_of_the_uncut_run_to_the_last_bit(uncut: Path, eventful: Eventful) -> None:
    expected, found = figures(uncut), figures(eventful.run)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    on_two_nodes = range(1, eventful.resumed[2] + 1)
    assert len(on_two_nodes) >= 150
    assert {step: found[step] for step in on_two_nodes} == {step: expected[step] for step in on_two_nodes}


def test_on_one_node_losses_differ_by_rounding_alone(uncut: Path, eventful: Eventful) -> None:
    expected, found = figures(uncut), figures(eventful.run)
    for step in range(eventful.resumed[2] + 1, STEPS + 1):
        assert found[step][0] == pytest.approx(expected[step][0], abs=1e-5)


def test_a_job_keeps_code_config_and_the_log_of_every_rank(eventful: Eventful) -> None:
    for number, job in enumerate(eventful.jobs):
        folder = eventful.run / "jobs" / job
        assert json.loads((folder / "config.json").read_text())["training"]["max_steps"] == STEPS
        assert "NCCL_DEBUG=WARN" in (folder / "environment.txt").read_text()
        logs = sorted(path.name for path in folder.glob("rank-*.log"))
        assert logs == ["rank-00000.log", "rank-00001.log"][: 1 if number == 3 else 2]
        with tarfile.open(folder / "code.tar.gz") as code:
            assert {"megamoe/cli/train.py", "slurm/launch.sh"} <= set(code.getnames())


def test_the_links_of_a_chain_go_on_with_one_run_and_those_after_its_end_return(checkout: Checkout) -> None:
    """On two nodes with two tasks each; two links are elements of an array, the third waits for its name."""
    words = (
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1",
        "slurm/small_enwik8.sh", *TOY, "training.max_steps=3", "name=chain",
    )  # fmt: skip
    array = checkout.sbatch("--array=1-2%1", *words)
    single = checkout.sbatch("--dependency=singleton", *words)
    assert checkout.cluster.job(single)["Dependency"] != "(null)"
    checkout.wait(single)
    first, *others = (checkout.log(job) for job in (f"{array}_1", f"{array}_2", single))
    assert "layout         4 data-parallel ranks" in first
    assert "step 3/3" in first
    for later in others:
        assert "runs/chain: all 3 steps are done and scored" in later
        assert "step 3/3" not in later


def test_elements_of_a_comparison_train_apart_and_come_back_apart(checkout: Checkout, tmp_path: Path) -> None:
    """Submitted from elsewhere; one element beyond the lists, and the last of the others is told to stop."""
    job = checkout.cluster.submit(
        "--array=0-2", "--nodes=1", *ONE_TASK_EACH, REPOSITORY / "slurm/compare_routers.sh", *TOY,
        f"training.max_steps={STEPS}", f"data.path={checkout.folder / 'data/fox'}",
        folder=tmp_path,
        variables={
            "MEGAMOE_ROOT": str(REPOSITORY), "MEGAMOE_PYTHON": sys.executable,
            "MEGAMOE_OUTPUT_DIR": str(tmp_path / "out"),
            "ROUTERS": "hyper smoe", "SEEDS": "7",
        },
    )  # fmt: skip
    runs = tmp_path / "out/compare_small_enwik8"
    until_step(runs / "smoe-seed7", 5)
    checkout.cluster.run("scancel", "--signal=USR1", f"{job}_1")
    checkout.wait(f"{job}_1", restarts=1)
    assert checkout.wait(f"{job}_0")["Restarts"] == "0"
    for router in ("hyper", "smoe"):
        config = json.loads((runs / f"{router}-seed7/config.json").read_text())
        assert (config["moe"]["router"]["name"], config["training"]["seed"]) == (router, 7)
        assert len(figures(runs / f"{router}-seed7")) == STEPS
    assert checkout.wait(f"{job}_2", "FAILED")["ExitCode"] == "2:0"
    assert "SLURM_ARRAY_TASK_ID = 2: routers 'hyper smoe' and seeds '7' have elements 0 to 1" in checkout.log(
        f"{job}_2"
    )


@pytest.mark.parametrize(
    ("words", "message", "starts"),
    [
        ("moe.ruter=3", "megamoe: error: moe.ruter = '3': unknown key, did you mean 'router'?", False),
        (
            "moe.router.name=smeo",
            "megamoe: error: moe.router.name = 'smeo': unknown policy, did you mean 'smoe'?",
            True,
        ),
    ],
)
def test_a_mistake_is_refused_in_one_line_and_not_requeued(
    checkout: Checkout, words: str, message: str, starts: bool
) -> None:
    job = checkout.sbatch("--nodes=2", *ONE_TASK_EACH, "slurm/small_enwik8.sh", *TOY, words, f"name={words}")
    told = checkout.wait(job, "FAILED")
    assert (told["ExitCode"], told["Restarts"]) == ("2:0", "0")
    log = checkout.log(job)
    assert [line for line in log.splitlines() if "error: " in line and "megamoe" in line] == [message]
    assert (checkout.folder / "runs" / words).exists() == starts


def test_three_failures_without_progress_are_enough(checkout: Checkout) -> None:
    job = checkout.sbatch(
        "--nodes=1", *ONE_TASK_EACH, "slurm/small_enwik8.sh", *TOY, "name=broken", DS_ACCELERATOR="abacus"
    )
    told = checkout.wait(job, "FAILED", restarts=2)
    assert (told["ExitCode"], told["Restarts"]) == ("1:0", "2")
    log = checkout.log(job)
    assert log.count("ended with 1: requeue") == 2
    assert "ended with 1: 3 failures in a row brought no newer checkpoint, giving up" in log


def test_evaluation_on_two_nodes(checkout: Checkout, uncut: Path) -> None:
    job = checkout.sbatch("--nodes=2", *ONE_TASK_EACH, "slurm/evaluate.sh", "runs/uncut/best", "--json")
    checkout.wait(job)
    log = checkout.folder / f"runs/evaluate/jobs/{job}-0/rank-00000.log"
    scored: dict[str, Any] = json.loads("{" + log.read_text().partition("\n{")[2])
    reported = json.loads((uncut / "results.json").read_text())
    assert scored["loss_by_k"] == pytest.approx(reported["loss_by_k"], abs=1e-5)


def test_a_checkpoint_of_bytes_becomes_a_classifier(checkout: Checkout, uncut: Path) -> None:
    """By the template on one node; a signal to its step is answered by a checkpoint and a requeue."""
    job = checkout.sbatch(
        "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "slurm/finetune_sst2.sh",
        "--checkpoint", "runs/uncut/best", "training.max_steps=60", "training.batch_size=8",
        "evaluation.every=0", "evaluation.top_ks=2", "logging.every=1", "logging.tensorboard=false",
        "--deepspeed_config", "ds_configs/zero1_fp32.json",
    )  # fmt: skip
    run = checkout.folder / "runs/finetune_sst2"
    until_step(run, 10)
    checkout.cluster.run("scancel", "--signal=USR1", f"{job}.0")
    checkout.wait(job, restarts=1)
    assert [*figures(run)] == list(range(1, 61))
    results = json.loads((run / "results.json").read_text())
    assert results["sentences"] == 1066
    assert 0 < results["accuracy_by_k"]["2"] < 1


def test_preflight_measures_both_nodes(checkout: Checkout) -> None:
    job = checkout.sbatch("--nodes=2", *ONE_TASK_EACH, "slurm/preflight.sh", "small_enwik8", *TOY, "--json")
    checkout.wait(job)
    log = checkout.folder / f"runs/preflight/jobs/{job}-0/rank-00000.log"
    report = json.loads("{" + log.read_text().partition("\n{")[2])
    assert [rank["host"] for rank in report["ranks"]] == ["node1", "node2"]
    assert all(rank["link"] > 0 and rank["shared_folder"] for rank in report["ranks"])
    assert not any(finding["stops"] for finding in report["findings"])
