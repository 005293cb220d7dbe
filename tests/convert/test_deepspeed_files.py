import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.load import load_model
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.convert.native import expert_file, neutral_name, parse_expert, shard_file
from megamoe.convert.neutral import open_neutral
from tests.checkpoint.runs import differing
from tests.convert.test_inspect import LIST, REPOSITORY
from tests.ranks import run_ranks
from tools.convert_checkpoint import main

pytestmark = pytest.mark.distributed

BF16, FP32 = {"bf16": {"enabled": True}}, {}
# Name of the folder: expert-parallel size, ZeRO stage, precision.
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "bf16": (2, 1, BF16),
    "fp32": (1, 2, FP32),
    "master-grads": (2, 1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
}
# At stage 0 nothing is partitioned; DeepSpeed's files of stage 1 are what is written for any stage.
RUNS_OF_STAGE_0: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "whole-bf16": (2, BF16, {}),
    "whole-fp32": (2, FP32, {}),
    "whole-dense": (1, BF16, {"moe": {"layers": "none"}}),
}


def train(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Train, save, convert there and back, and go on twice: from the live engine, and from the files."""
    from tests.convert.native import NativeRun

    losses = {}
    runs = [(name, *run, {}) for name, run in RUNS.items()]
    runs += [(name, ep_size, 0, ds, updates) for name, (ep_size, ds, updates) in RUNS_OF_STAGE_0.items()]
    for name, ep_size, stage, ds, updates in runs:
        run = NativeRun(ep_size, ds | {"zero_optimization": {"stage": stage}}, **updates)
        run.train(2)
        run.save(folder / name)
        if run.world.is_main:
            convert(folder, name, ["--config", str(folder / name / "config.json")], ep_size)
        run.world.barrier()
        updates = updates | {"training": {"seed": 7}}
        again = NativeRun(ep_size, ds | {"zero_optimization": {"stage": stage or 1}}, **updates)
        again.load(folder / f"{name}-written")
        losses[name] = (run.train(2), again.train(2))
    return losses


def convert(folder: Path, name: str, config: list[str], ep_size: int) -> None:
    precision = "fp32" if name.endswith("fp32") else "bf16"
    sizes = ["--precision", precision, "--world-size", "2", "--ep-size", str(ep_size)]
    assert main(["from-deepspeed", str(folder / name), str(folder / f"{name}-neutral"), *config]) == 0
    assert (
        main(["to-deepspeed", str(folder / f"{name}-neutral"), str(folder / f"{name}-written"), *sizes]) == 0
    )


def reload(source: Path, folder: Path) -> list[float]:
    """On 4 ranks: load everything, save as DeepSpeed does; load the weights alone at another ep_size."""
    from tests.convert.native import NativeRun

    run = NativeRun(2, BF16 | {"zero_optimization": {"stage": 1}}, training={"seed": 7})
    run.load(source)
    run.save(folder)
    other = NativeRun(4, {"zero_optimization": {"stage": 2}}, training={"seed": 8})
    other.load(source, load_module_only=True)
    with torch.no_grad():
        return [run.loss(0).item(), other.loss(0).item()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for rank_losses in run_ranks(train, 2, folder):
        (folder / "losses.json").write_text(json.dumps(rank_losses))
    return folder


def neutral(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(tensor.kind, tensor.name): tensor.checked() for tensor in open_neutral(folder)[0]}


def require_as_live(folder: Path, live: dict[tuple[str, str], torch.Tensor]) -> None:
    tensors = neutral(folder)
    for (kind, name), values in live.items():
        if expert := parse_expert(name):
            path, index, leaf = expert
            assert torch.equal(tensors[kind, f"{path}.experts.{leaf}"][index], values), (kind, name)
        else:
            assert torch.equal(tensors[kind, neutral_name(name)], values), (kind, name)


@pytest.mark.parametrize("name", [*RUNS, *RUNS_OF_STAGE_0])
def test_every_tensor_is_the_live_engines(saved: Path, name: str) -> None:
    CheckpointReader(saved / f"{name}-neutral").verify()
    ranks = [torch.load(saved / name / f"live-{rank}.pt") for rank in range(2)]
    for live in ranks:
        require_as_live(saved / f"{name}-neutral", live)
    state = CheckpointReader(saved / f"{name}-neutral").state
    # At stage 0 in 16 bits DeepSpeed takes one step of Adam, with gradients of zero, before the first.
    adam_steps = 3 if name in ("whole-bf16", "whole-dense") else 2
    assert (state.step, state.engine.global_steps, state.engine.optimizer_step) == (2, 2, adam_steps)
    assert load_model(saved / f"{name}-neutral")(torch.arange(12).view(2, 6)).hidden_BSD.isfinite().all()


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on_from_converted_files_bit_for_bit(saved: Path, name: str) -> None:
    live, loaded = json.loads((saved / "losses.json").read_text())[name]
    assert live == loaded


@pytest.mark.parametrize("name", RUNS_OF_STAGE_0)
def test_training_goes_on_from_whole_states(saved: Path, name: str) -> None:
    """DeepSpeed's stages 0 and 1 sum gradients in another order, in 16 bits."""
    live, loaded = json.loads((saved / "losses.json").read_text())[name]
    assert loaded == pytest.approx(live, rel=1e-5 if name.endswith("fp32") else 5e-3)


@pytest.mark.parametrize("name", ["bf16", "whole-bf16"])
def test_a_listing_needs_no_torch(saved: Path, name: str) -> None:
    listed = subprocess.run([sys.executable, "-c", LIST, saved / name], cwd=REPOSITORY, capture_output=True)
    assert listed.returncode == 0, listed.stderr
    assert b"exp_avg_sq" in listed.stdout


@pytest.mark.parametrize("name", RUNS)
def test_written_files_hold_what_deepspeed_wrote(saved: Path, name: str, tmp_path: Path) -> None:
    ours, theirs = saved / f"{name}-written" / "converted", saved / name / "saved"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.iterdir():
        expected, found = (flat(torch.load(p, weights_only=False)) for p in (path, ours / path.name))
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert main(["from-deepspeed", str(saved / f"{name}-written"), str(tmp_path / "again")]) == 0
    assert differing(saved / f"{name}-neutral", tmp_path / "again") == []


def flat(content: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested dicts and lists; what `to-deepspeed` adds is left out."""
    if isinstance(content, torch.Tensor):
        return {path: content}
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    found = {}
    for key, value in pairs:
        if isinstance(value, dict | list | tuple | torch.Tensor) and key != "megamoe":
            found |= flat(value, f"{path}/{key}")
    return found


def test_another_number_of_ranks_gets_the_same_tensors(saved: Path, tmp_path: Path) -> None:
    sizes = ["--precision", "bf16", "--world-size", "4", "--ep-size", "2"]
    assert main(["to-deepspeed", str(saved / "bf16-neutral"), str(tmp_path / "four"), *sizes]) == 0
    losses = run_ranks(reload, 4, tmp_path / "four", tmp_path / "saved")
    for rank, (with_masters, weights_alone) in enumerate(losses):
        require_as_live(saved / "bf16-neutral", torch.load(tmp_path / "saved" / f"live-{rank}.pt"))
        assert weights_alone == pytest.approx(with_masters, rel=2e-2)  # computed in fp32 and in bf16
    config = ["--config", str(tmp_path / "saved" / "config.json")]
    assert main(["from-deepspeed", str(tmp_path / "saved"), str(tmp_path / "again"), *config]) == 0
    assert differing(saved / "bf16-neutral", tmp_path / "again") == []


def test_weights_alone(saved: Path, tmp_path: Path) -> None:
    assert main(["to-deepspeed", str(saved / "fp32-neutral"), str(tmp_path / "native")]) == 0
    assert main(["from-deepspeed", str(tmp_path / "native"), str(tmp_path / "again")]) == 0
    assert {kind for kind, _ in differing(saved / "fp32-neutral", tmp_path / "again")} == {
        "exp_avg",
        "exp_avg_sq",
    }
    state = CheckpointReader(tmp_path / "again").state
    assert (state.step, state.engine.optimizer_step) == (2, 0)
    config = ["--config", str(saved / "bf16" / "config.json"), "--weights-only"]
    assert main(["from-deepspeed", str(saved / "bf16"), str(tmp_path / "half"), *config]) == 0
    half, master = neutral(tmp_path / "half"), neutral(saved / "bf16-neutral")
    name = ("weight", "layers.0.moe.experts.w_in")
    assert torch.equal(half[name], master[name].bfloat16().float()) and not torch.equal(
        half[name], master[name]
    )


def remove(name: str) -> Any:
    return lambda tag: (tag / name).unlink()


def replace(name: str, other: str) -> Any:
    return lambda tag: shutil.copy(tag / other, tag / name)


def exchange_shards(tag: Path) -> None:
    first, second = (tag / shard_file(rank, bf16=True) for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def run_code(tag: Path) -> None:
    path = tag / expert_file(0, 0)
    torch.save({"layers.0.moe.deepspeed_moe.experts.deepspeed_experts.0.w_in": Hostile()}, path)
    assert pickle.loads(pickle.dumps(Hostile())) is None  # it would


def change_a_master(tag: Path) -> None:
    path = tag / shard_file(1, bf16=True)
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].data[3] += 1
    torch.save(content, path)


def share_a_moment(tag: Path) -> None:
    path = tag / shard_file(1, bf16=True)
    content = torch.load(path, weights_only=False)
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]
    state["exp_avg"] = state["exp_avg_sq"]
    torch.save(content, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(expert_file(1, 2)), f"missing {expert_file(1, 2)}"),
        (replace(expert_file(0, 1), expert_file(0, 0)), "which is not of expert 1"),
        (replace(expert_file(2, 0), expert_file(0, 0)), f"{expert_file(2, 0)} belong to no expert"),
        (replace(expert_file(1, 3), expert_file(0, 3)), "not the tensors of expert 0"),
        (remove(shard_file(1, bf16=True)), f"missing {shard_file(1, bf16=True)}"),
        (exchange_shards, "its fp32 master is not what the saved weight was rounded from"),
        (replace(shard_file(0, bf16=True), shard_file(1, bf16=True)), "no rank holds its"),
        (change_a_master, "its fp32 master is not what the saved weight was rounded from"),
        (share_a_moment, "two of its tensors are one"),
        (remove("mp_rank_00_model_states.pt"), "has no mp_rank_00_model_states.pt"),
        (replace("mp_rank_00_model_states.pt", expert_file(0, 0)), "not laid out as DeepSpeed's"),
        (run_code, "refused"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "bf16", tmp_path / "bad")
    damage(tmp_path / "bad" / "saved")
    (tmp_path / "executed").unlink(missing_ok=True)
    config = ["--config", str(saved / "bf16" / "config.json")]
    assert main(["from-deepspeed", str(tmp_path / "bad"), str(tmp_path / "out"), *config]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


def change_states(name: str, change: Any) -> Any:
    """Save the states of a rank at stage 0 anew, changed."""

    def damage(tag: Path) -> None:
        content = torch.load(tag / name, weights_only=False)
        change(content["optimizer"])
        torch.save(content, tag / name)

    return damage


def exchange_states(optimizer: Any) -> None:
    states = optimizer["optimizer_state_dict"]["state"]
    states[0], states[2] = states[2], states[0]


def exchange_masters(optimizer: Any) -> None:
    first, *_ = optimizer["fp32_groups"]
    first[0], first[1] = first[1], first[0]


def count_one_more(optimizer: Any) -> None:
    optimizer["optimizer_state_dict"]["state"][3]["step"] += 1


def own_groups(optimizer: Any) -> None:
    optimizer["optimizer_state_dict"]["param_groups"][0]["name"] = "decay"


EXPP = "expp_rank_{}_mp_rank_00_optim_states.pt".format


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(EXPP(0)), "missing expp_rank_0_"),
        (remove(EXPP(1)), r"holds \d+ states for \d+ parameters"),
        (change_states(EXPP(1), exchange_states), "a state of attention_bias_u has shape"),
        (change_states(EXPP(0), exchange_masters), "its fp32 master is not what the saved weight"),
        (change_states(EXPP(1), own_groups), "groups of your own"),
        (change_states(EXPP(1), lambda o: o["optimizer_state_dict"]["state"].pop(3)), "not laid out"),
        (change_states(EXPP(0), count_one_more), "different Adam steps"),
    ],
)  # fmt: skip
def test_damaged_whole_states_are_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    shutil.copytree(saved / "whole-bf16", tmp_path / "bad")
    damage(tmp_path / "bad" / "saved")
    config = ["--config", str(saved / "bf16" / "config.json")]
    assert main(["from-deepspeed", str(tmp_path / "bad"), str(tmp_path / "out"), *config]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_files_of_stage_3_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert main(["from-deepspeed", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "was saved at ZeRO stage 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from-deepspeed", "bf16", "x"], "give its config with --config"),
        (["from-deepspeed", "bf16", "x", "--config", "bf16/config.json", "--ep-size", "1"], "was saved at 2"),
        (["to-deepspeed", "bf16-neutral", "x", "--ep-size", "2"], "leave it out, or give --world-size"),
        (["to-deepspeed", "bf16-neutral", "x", "--world-size", "4", "--ep-size", "3"], "give a divisor"),
        (["to-deepspeed", "bf16-neutral", "x", "--tag", "../y"], "plain name"),
        (["to-deepspeed", "bf16-neutral", "bf16"], "exists; remove it"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(saved)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (saved / "x").exists()


def test_a_checkpoint_without_moments_gives_no_shards(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(saved / "bf16" / "config.json"), "--weights-only"]
    main(["from-deepspeed", str(saved / "bf16"), str(tmp_path / "half"), *config])
    assert main(["to-deepspeed", str(tmp_path / "half"), str(tmp_path / "x"), "--world-size", "2"]) == 2
    assert "leave --world-size out" in capsys.readouterr().err
