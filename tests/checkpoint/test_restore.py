"""One checkpoint through ranks, expert-parallel sizes, ZeRO stages and precisions, and back."""

import errno
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

import megamoe
from megamoe.checkpoint.format import MANIFEST
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.restore import restore_checkpoint
from megamoe.checkpoint.state import EngineCounters
from megamoe.errors import CheckpointError
from megamoe.parallel import fragments
from megamoe.parallel.counters import read_counters
from megamoe.parallel.device import Device
from megamoe.parallel.launch import World
from megamoe.parallel.placement import placements
from tests.checkpoint.runs import (
    BF16,
    BF16_OPTIMIZER,
    FP16,
    FP32,
    OFFLOAD,
    OFFLOAD_ALL,
    ROUND_ROBIN,
    SmallRun,
    differing,
    held_tensors,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ORIGIN = "step-000000002"
OTHER_SEED = {"training": {"seed": 7}}
NO_CLIP = {"training": {"seed": 7, "grad_clip": 0.0}}
# Where the checkpoint of two expert-parallel ranks at ZeRO-1 in bf16 goes, on two ranks.
TARGETS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "stage 0": (0, 1, FP32, NO_CLIP),
    "stage 0, experts spread": (0, 2, FP32, NO_CLIP),
    "stage 1 in fp32": (1, 1, FP32, OTHER_SEED),
    "stage 2": (2, 1, BF16, OTHER_SEED),
    "stage 2, states offloaded": (2, 2, OFFLOAD, OTHER_SEED),
    "stage 2, round robin": (2, 2, ROUND_ROBIN, OTHER_SEED),
    "stage 3": (3, 1, BF16, OTHER_SEED),
    "stage 3, all offloaded": (3, 1, OFFLOAD_ALL, OTHER_SEED),
    "stage 3 in fp32": (3, 1, FP32, OTHER_SEED),
    "fp32 accumulation": (1, 2, BF16_OPTIMIZER, OTHER_SEED),
}


def two_ranks(root: str) -> dict[str, Any]:
    folder = Path(root)
    run = SmallRun(1, 2, BF16)
    run.train(2)
    run.save(folder / ORIGIN, tokens_seen=48, best_metric=1.5, best_step=2)
    results: dict[str, Any] = {"uncut": run.train(2)}
    run.save(folder / "uncut")
    resumed = SmallRun(1, 2, BF16, **OTHER_SEED)
    results["state"] = resumed.load(folder / ORIGIN)
    results["cast"] = computes_with_cast_masters(resumed, folder / ORIGIN)
    results["resumed"] = resumed.train(2)
    resumed.save(folder / "resumed")
    results["fp32"] = cut_in_fp32(folder)
    fragments._SMALLEST_PART = 50  # so that ranks share out replicated tensors of this small model
    for name, (stage, ep_size, ds, updates) in TARGETS.items():
        target = SmallRun(stage, ep_size, ds, **updates)
        target.load(folder / ORIGIN)
        target.save(folder / name)
        results[name] = target.train(2)
    results["frozen"] = {stage: freeze_and_restore(stage) for stage in range(4)}
    results["elements read"] = elements_read(folder / ORIGIN)
    results["weights alone"] = load_weights_alone(folder)
    results["failures"] = failures(run, folder)
    return results


def computes_with_cast_masters(run: SmallRun, folder: Path) -> bool:
    saved, placed = CheckpointReader(folder), placements(run.engine.model)
    for name, parameter in run.engine.model.named_parameters():
        origin = placed[name][1]
        master = saved.read("weight", name, origin, origin + parameter.numel()).view_as(parameter)
        if not torch.equal(parameter, master.bfloat16()):
            return False
    return True


def cut_in_fp32(folder: Path) -> tuple[list[float], list[float]]:
    """Two micro-batches per step, at ZeRO-2."""
    updates = {"training": {"micro_batch_size": 1}}
    run = SmallRun(2, 2, FP32, **updates)
    run.train(1)
    run.save(folder / "fp32")
    uncut = run.train(2)
    run.save(folder / "fp32 uncut")
    resumed = SmallRun(2, 2, FP32, training=updates["training"] | {"seed": 7})
    resumed.load(folder / "fp32")
    losses = resumed.train(2)
    resumed.save(folder / "fp32 resumed")
    return uncut, losses


def freeze_and_restore(stage: int) -> str:
    """Write and read an engine with a frozen layer; the first problem, or nothing."""
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 3))
    model[0].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.Adam(trained), config=config)
    adapter = SimpleNamespace(model=model, deepspeed=engine)
    try:
        owned = list(fragments.owned_fragments(adapter))
    except CheckpointError as error:
        return str(error)
    world = World(torch.distributed.get_rank(), 2, torch.device("cpu"))
    parts = world.gather_objects([(f.name, f.start, f.stop) for f in owned])
    covered = {name: 0 for name, _ in model.named_parameters()}
    for name, start, stop in sorted(itertools.chain(*parts)):
        if start != covered[name]:
            return f"{name}: {start} follows {covered[name]}"
        covered[name] = stop
    if covered != {name: p.numel() for name, p in model.named_parameters()}:
        return f"covers {covered}"
    fragments.restore_fragments(adapter, lambda _, *where: torch.arange(*where[1:]) + 0.5, optimizer_step=0)
    fragments.publish_weights(adapter)
    restored = all(torch.equal(p.flatten(), torch.arange(p.numel()) + 0.5) for p in model.parameters())
    return "" if restored else "weights were not restored"


def elements_read(folder: Path) -> int:
    """How many weights this rank asks for."""
    run, reader, asked = SmallRun(1, 2, BF16), CheckpointReader(folder), []

    def read(kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        if kind == "weight":
            asked.append(stop - start)
        return reader.read(kind, name, start, stop)

    fragments.restore_fragments(run.engine, read, optimizer_step=2)
    return sum(asked)


def load_weights_alone(folder: Path) -> tuple[EngineCounters, EngineCounters]:
    """Into an engine that has trained, so that there are moments to forget."""
    run = SmallRun(1, 1, BF16, **OTHER_SEED)
    run.train(1)
    before = read_counters(run.engine.deepspeed)
    run.load(folder / ORIGIN, load_optimizer=False)
    run.save(folder / "weights alone")
    return before, read_counters(run.engine.deepspeed)


def failures(run: SmallRun, folder: Path) -> dict[str, str]:
    """What this rank is told when rank 1 cannot do its part, and of a checkpoint of another model."""

    def full_disk() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    def load_damaged() -> None:
        if run.world.rank == 1:
            restore_checkpoint(CheckpointReader(damaged_copy(folder / ORIGIN)), run.engine, run.world)
        else:
            restore_checkpoint(CheckpointReader(folder / ORIGIN), run.engine, run.world)

    memory = list(run.memory())
    new = folder / "step-000000009"
    on_rank_1 = run.world.rank == 1
    other = SmallRun(1, 2, BF16, moe={"n_experts": 8})
    return {
        "full disk": error_of(lambda: run.save(new, full_disk() if on_rank_1 else memory)),
        "incomplete": error_of(lambda: run.save(new, [] if on_rank_1 else memory)),
        "damaged": error_of(load_damaged),
        "other model": error_of(lambda: other.load(folder / ORIGIN)),
    }


def error_of(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def damaged_copy(folder: Path) -> Path:
    copy = shutil.copytree(folder, folder.with_name("damaged"))
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    return copy


def four_ranks(root: str) -> None:
    run = SmallRun(1, 4, BF16, **OTHER_SEED)
    run.load(Path(root, ORIGIN))
    run.save(Path(root, "four ranks"))


def one_rank(root: str) -> dict[str, Any]:
    run = SmallRun(1, 1, FP32, **OTHER_SEED)
    run.load(Path(root, "four ranks"))
    run.save(Path(root, "one rank"))
    results = {"loss": run.evaluate(), "tokens": run.tokens().tolist()}
    if Device.detect().fp16:
        results["fp16"] = cut_in_fp16(Path(root))
    return results


def cut_in_fp16(folder: Path) -> Any:
    run = SmallRun(1, 1, FP16)
    run.train(3)
    run.save(folder / "fp16")
    counters = read_counters(run.engine.deepspeed)
    resumed = SmallRun(1, 1, FP16, **OTHER_SEED)
    resumed.load(folder / "fp16")
    return counters, read_counters(resumed.engine.deepspeed), run.train(3), resumed.train(3)


def back_on_two_ranks(root: str) -> list[float]:
    run = SmallRun(1, 2, BF16, **OTHER_SEED)
    run.load(Path(root, "one rank"))
    run.save(Path(root, "back"))
    return run.train(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restore")


@pytest.fixture(scope="module")
def two(root: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, str(root))


@pytest.fixture(scope="module")
def round_trip(root: Path, two: Any) -> tuple[dict[str, Any], list[list[float]]]:
    run_ranks(four_ranks, 4, str(root))
    [one] = run_ranks(one_rank, 1, str(root))
    return one, run_ranks(back_on_two_ranks, 2, str(root))


def test_a_resumed_run_repeats_the_uncut_one_in_bf16(two, root):
    for rank in two:
        assert rank["resumed"] == rank["uncut"]
    assert differing(root / "resumed", root / "uncut") == []
    assert len(differing(root / "resumed", root / ORIGIN)) > 40


def test_a_resumed_run_repeats_the_uncut_one_in_fp32_with_accumulation(two, root):
    for rank in two:
        uncut, resumed = rank["fp32"]
        assert resumed == uncut
        assert len(uncut) == 4
    assert differing(root / "fp32 resumed", root / "fp32 uncut") == []


def test_a_checkpoint_is_complete_and_neutral(two, root):
    saved, model = held_tensors(root / ORIGIN), megamoe.load_model(root / ORIGIN)
    names = {name for name, _ in model.named_parameters()}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert {name for k, name in saved if k == kind} == names
        assert all(saved[kind, name].dtype == torch.float32 for name in names)
    assert {name for kind, name in saved if kind == "buffer"} == {name for name, _ in model.named_buffers()}
    assert saved["weight", "layers.1.moe.experts.w_in"].shape == (4, 8, 16)
    assert saved["exp_avg_sq", "layers.1.moe.experts.w_in"].count_nonzero() == 4 * 8 * 16
    assert saved["memory", "layers.0"].shape == (4, 8, 16)
    assert saved["memory", "layers.0"].dtype == torch.bfloat16
    CheckpointReader(root / ORIGIN).verify()


def test_state_comes_back_with_the_counters_of_the_engine(two):
    for rank in two:
        state = rank["state"]
        assert (state.step, state.tokens_seen, state.best_metric, state.best_step) == (2, 48, 1.5, 2)
        assert state.engine == EngineCounters(global_steps=2, global_samples=8, optimizer_step=2)


def test_half_precision_weights_are_the_cast_masters(two):
    assert all(rank["cast"] for rank in two)


@pytest.mark.parametrize("target", TARGETS)
def test_every_tensor_survives_another_layout(two, root, target):
    assert differing(root / ORIGIN, root / target) == []
    assert all(torch.tensor(rank[target]).isfinite().all() for rank in two)


def test_equal_precision_continues_equally_in_another_layout(two):
    for rank in two:
        for name in ("fp32 accumulation", "stage 2, states offloaded", "stage 2, round robin"):
            assert rank[name] == rank["uncut"], name
        assert rank["stage 3, all offloaded"] == rank["stage 3"] == rank["stage 2"]
        assert rank["stage 3 in fp32"] == rank["stage 1 in fp32"]
        assert rank["stage 0"][0] == rank["stage 1 in fp32"][0]


def test_through_four_ranks_and_one_and_back(two, round_trip, root):
    _, back = round_trip
    for name in ("four ranks", "one rank", "back"):
        assert differing(root / ORIGIN, root / name) == []
    assert back == [rank["uncut"] for rank in two]
    assert len(list((root / "four ranks").glob("shard-*-of-00004.safetensors"))) == 4


def test_a_loaded_model_scores_as_the_engine_does(round_trip, root):
    one, _ = round_trip
    model, tokens_BS = megamoe.load_model(root / "one rank"), torch.tensor(one["tokens"])
    loss_BS = model(tokens_BS[:, :-1], tokens_BS[:, 1:], top_k=2).loss_BS
    torch.testing.assert_close(loss_BS, torch.tensor(one["loss"]), rtol=0, atol=1e-6)


def test_loss_scaling_is_resumed(round_trip):
    one, _ = round_trip
    if "fp16" not in one:
        pytest.skip("this CPU has no float16 arithmetic")
    saved, restored, uncut, resumed = one["fp16"]
    assert restored == saved
    assert saved["loss_scaler"]["cur_scale"] != 2**6
    assert resumed == uncut


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_parameters_are_kept(two, stage):
    assert [rank["frozen"][stage] for rank in two] == ["", ""]


def test_frozen_parameters_are_refused_at_stage_3(two):
    assert all("frozen parameters at ZeRO stage 3: cannot be saved" in rank["frozen"][3] for rank in two)


def test_each_rank_reads_what_it_holds(two, root):
    n_weights = sum(t.numel() for (kind, _), t in held_tensors(root / ORIGIN).items() if kind == "weight")
    assert sum(rank["elements read"] for rank in two) == n_weights
    assert all(rank["elements read"] < 0.55 * n_weights for rank in two)


def test_weights_alone_start_the_optimizer_afresh(two, root):
    saved, original = held_tensors(root / "weights alone"), held_tensors(root / ORIGIN)
    assert all(torch.equal(saved[key], original[key]) for key in original if key[0] in ("weight", "buffer"))
    assert not any(saved[key].any() for key in original if key[0] in ("exp_avg", "exp_avg_sq"))
    for rank in two:
        before, after = rank["weights alone"]
        assert (before["optimizer_step"], after["optimizer_step"]) == (1, 0)
        assert after["global_steps"] == before["global_steps"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("full disk", "saving step-000000009: failed on rank 1: OSError: [Errno 28] No space left on device"),
        ("incomplete", "failed on rank 0: manifest.json: memory 'layers.0': pieces hold 256 elements"),
        ("damaged", "failed on rank 1: checkpoint"),
        ("other model", "moe.n_experts = 8: checkpoint"),
    ],
)
def test_a_failure_of_one_rank_is_told_to_all(two, failure, message):
    for rank in two:
        assert message in rank["failures"][failure]
        assert "\n" not in rank["failures"][failure]


def test_a_failed_save_leaves_nothing_behind(two, root):
    assert not (root / "step-000000009").exists()
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert (root / ORIGIN / MANIFEST).exists()
