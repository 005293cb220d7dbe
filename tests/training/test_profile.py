"""Where the time of a step goes: real profiles on one and two ranks, and how time is put down to rooms."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from megamoe.config import load_config
from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from megamoe.models.model_of import model_of
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.rooms import room
from megamoe.training.profile.flops import flop_counter
from megamoe.training.profile.rooms import Times, time_by_room
from tests.cli.conftest import CONFIG
from tests.environment import environment
from tests.processes import PATIENCE_SECONDS, ranks

N_STEPS = 2
ARGUMENTS = (
    "train", "--config", "toy.toml", "--deepspeed_config", "fp32.json", "name=toy", "moe.layers=1",
    f"logging.profile_steps={N_STEPS}", "logging.tensorboard=false",
)  # fmt: skip
FINETUNE = (
    "finetune", "--task", "sst2", "--checkpoint", "runs/toy", "--deepspeed_config", "fp32.json", "--profile",
    "name=classifier", "training.batch_size=8", f"logging.profile_steps={N_STEPS}",
)  # fmt: skip
ROOMS = {
    "attention", "routing", "experts", "exchange", "feed_forward", "loss", "optimizer", "data", "rest",
}  # fmt: skip
SEVERAL_COMMANDS = """
import json, sys
from megamoe.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
    print("=====")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 150)
    prepare(open_text([folder / "fox.txt"], "the fox", by_lines=False), folder / "data", "bytes")
    (folder / "toy.toml").write_text(CONFIG)
    (folder / "fp32.json").write_text('{"zero_optimization": {"stage": 1}}')
    return folder


@pytest.fixture(scope="module")
def outputs(project: Path) -> list[str]:
    """What five commands on one text print, and the profile of a classifier that starts from it."""
    profile = [*ARGUMENTS, "--profile"]
    copies = [*profile, "name=trained", "checkpoint.resume=runs/toy"]
    commands = json.dumps([profile, ARGUMENTS, copies, profile, ARGUMENTS, FINETUNE])
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_COMMANDS, commands], cwd=project, env=environment(),
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=====\n")


def figures_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile/rooms.json").read_text())


def seconds_of_steps(trace: Path) -> list[float]:
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "megamoe::step"]
    return [event["dur"] / 1e6 for event in steps if event["cat"] == "user_annotation"]


def require_rooms_of_the_steps(figures: dict[str, Any], trace: Path) -> None:
    assert set(figures["rooms"]) == ROOMS
    durations = seconds_of_steps(trace)
    assert len(durations) == N_STEPS
    told = sum(sum(times.values()) for times in figures["rooms"].values())
    assert told == pytest.approx(sum(durations) / N_STEPS, rel=1e-3)
    passes = {
        name: {key for key, value in times.items() if value} for name, times in figures["rooms"].items()
    }
    assert passes["data"] == {"between"}
    assert passes["optimizer"] == {"backward", "between"}
    assert all(passes[name] == {"forward", "backward"} for name in ROOMS - {"data", "optimizer"})


def test_a_profile_tells_where_the_time_of_its_steps_went(outputs, project):
    figures = figures_of(project / "runs/toy")
    require_rooms_of_the_steps(figures, project / "runs/toy/profile/rank-00000.trace.json")
    assert (figures["steps"], figures["top_k"], figures["dtype"]) == (N_STEPS, 2, "float32")
    assert figures["tokens_per_second"] == pytest.approx(64 / figures["step_seconds"])
    used = figures["flops_per_step"] / figures["step_seconds"]
    assert figures["mfu"] == pytest.approx(used / figures["gemm_peak_flops"])
    for shown in (
        "feed forward",
        "100.0%",
        "tokens/s",
        "of the measured GEMM peak",
        "runs/toy/profile/rank-*",
    ):
        assert outputs[0].count(shown) == 1, shown


def test_operations_are_those_of_the_model(outputs, project):
    run = load_config(file=project / "toy.toml", overrides=["moe.layers=1", "model.vocab_size=256"])
    model = model_of(run)
    text = torch.arange(4 * 32).view(4, 32) % 256
    memory = model(text[:, :16], text[:, 1:17]).memory
    with FlopCounterMode(display=False) as counter:
        model(text[:, 16:], text[:, 16:], memory).loss_BS.mean().backward()
    assert figures_of(project / "runs/toy")["flops_per_step"] == counter.get_total_flops()


def test_a_run_of_the_same_name_is_untouched(outputs, project):
    """Profiled first, then trained, profiled again, and gone on with."""
    assert "step 6/6 | validation: " in outputs[1]
    assert "resuming" not in outputs[1]
    assert "all 6 steps are done and scored" in outputs[4]
    assert not (project / "runs/toy/profile/checkpoints").exists()
    assert figures_of(project / "runs/toy")["last_step"] == 5 + 3 * N_STEPS
    log = (project / "runs/toy/metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines() if "train/loss" in line] == [2, 4, 6]


def test_the_steps_of_a_trained_model_are_profiled_on_request(outputs, project):
    assert figures_of(project / "runs/trained")["last_step"] == 6 + 5 + 3 * N_STEPS
    assert {path.name for path in (project / "runs/trained").iterdir()} == {"profile"}


def test_fine_tuning_is_profiled_too(outputs, project):
    assert "time of a step by room" in outputs[5]
    assert {path.name for path in (project / "runs/classifier").iterdir()} == {"profile"}
    figures = figures_of(project / "runs/classifier")
    require_rooms_of_the_steps(figures, project / "runs/classifier/profile/rank-00000.trace.json")
    assert figures["last_step"] == 5 + 3 * N_STEPS


@pytest.mark.distributed
def test_each_rank_writes_its_trace(project):
    with ranks(2, *ARGUMENTS, "--profile", "name=two", folder=project) as processes:
        told = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert ["time of a step by room" in output for output, _ in told] == [True, False]
    figures = figures_of(project / "runs/two")
    assert figures["ranks"] == 2
    for rank in (0, 1):
        trace = project / f"runs/two/profile/rank-{rank:05d}.trace.json"
        assert len(seconds_of_steps(trace)) == N_STEPS
    require_rooms_of_the_steps(figures, project / "runs/two/profile/rank-00000.trace.json")


class Slow(torch.autograd.Function):
    """Takes 20 ms forward and 40 ms backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        time.sleep(0.02)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors  # computed again where they were not kept
        time.sleep(0.04)
        return gradient


def in_a_room(x: torch.Tensor) -> torch.Tensor:
    with room("experts"):
        return Slow.apply(x)


def recomputed(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(in_a_room, x, use_reentrant=False)


def times_of(function: Any) -> Times:
    x = torch.ones(3, requires_grad=True)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded, room("step"):
        with room("attention"):
            y = torch.arange(3) + x
        z = function(y)
        with room("loss"):
            loss = z.sum()
        with room("backward"):
            loss.backward()
    return time_by_room(recorded.events(), 1, on_device=False)


def beside(slow: str, times: Times) -> float:
    """Seconds of all other rooms."""
    return sum(sum(spent.values()) for name, spent in times.items() if name != slow)


@pytest.mark.parametrize(
    ("function", "slow", "forward", "backward"),
    [
        pytest.param(in_a_room, "experts", 0.02, 0.04, id="in a room"),
        pytest.param(recomputed, "experts", 0.02, 0.06, id="recomputed"),
        pytest.param(Slow.apply, "rest", 0.02, 0.04, id="in no room"),
    ],
)
def test_backward_time_belongs_to_the_room_of_the_operation(function, slow, forward, backward):
    times = times_of(function)
    assert times[slow]["forward"] >= forward
    assert times[slow]["backward"] >= backward
    assert set(times) == {"attention", slow, "loss", "optimizer", "rest"}
    # The least of some tries: what else runs on the machine adds to any time now and then.
    tries = (times_of(function) for _ in range(5))
    assert min(beside(slow, times) for times in tries) < 0.02


def test_rooms_cost_nothing_while_nothing_is_recorded():
    assert room("experts") is room("attention")


def products() -> Iterator[tuple[str, Any, int]]:
    """Products of matrices, and the multiply-adds of each."""
    a, b, c = torch.ones(6, 4), torch.ones(4, 8), torch.ones(6, 8)
    stack, ends = torch.ones(3, 4, 8), torch.tensor([1, 4, 6], dtype=torch.int32)
    yield "mm", lambda: a @ b, 6 * 4 * 8
    yield "addmm_", lambda: c.addmm_(a, b), 6 * 4 * 8
    yield "baddbmm_", lambda: torch.ones(3, 6, 8).baddbmm_(torch.ones(3, 6, 4), stack), 3 * 6 * 4 * 8
    yield "grouped", lambda: functional.grouped_mm(a, stack, offs=ends), 6 * 4 * 8
    transposed = torch.ones(6, 4).t()
    yield "grouped gradient", lambda: functional.grouped_mm(transposed, c, offs=ends), 4 * 6 * 8


@pytest.mark.parametrize(("name", "product", "n_multiply_adds"), list(products()))
def test_every_product_is_counted(name, product, n_multiply_adds):
    with flop_counter() as counter:
        product()
    assert counter.get_total_flops() == 2 * n_multiply_adds


def test_experts_take_three_times_their_forward_pass():
    experts = Experts(4, 8, 16, dropout=0.0, init_std=0.1, seed=0, layer=0, local=range(4))
    x = torch.ones(10, 8, requires_grad=True)
    with flop_counter() as counter:
        ids_T1 = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3, 3])[:, None]
        arrived = LocalExchange().dispatch(x, ids_T1, torch.ones(10, 1), 4, None)
        experts(arrived).sum().backward()
    # And once the gradients of the weights with respect to the biases of all experts.
    assert counter.get_total_flops() == 3 * 2 * (2 * 10 * 8 * 16) + 2 * 10 * 8 * 4
