"""Experts in slots against experts in memory: the same numbers, whatever is where when."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megamoe
from megamoe.config import from_dict
from megamoe.errors import CheckpointError, ConfigError
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.budget import Budget
from megamoe.serve.loader import WAITING_LAYERS
from megamoe.serve.offload import OffloadedModel
from megamoe.serve.replacement import POLICIES, count_misses
from tests.checkpoint.runs import RUN, VOCAB_SIZE
from tests.checkpoint.small import write_model
from tests.convert.tool import convert
from tests.environment import environment
from tests.processes import PATIENCE_SECONDS
from tests.serve.models import write_language_model

N_EXPERTS = 6
EXPERT_BYTES = 4 * (2 * 8 * 16 + 8 + 16)
TOKENS = torch.randint(32, (3, 2, 9), generator=torch.Generator().manual_seed(5))
"""Three segments of two rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = {"layers": "all", "n_experts": N_EXPERTS}
    return write_language_model(tmp_path_factory.mktemp("run") / "best", moe=moe)


def slots_of(n: int) -> Budget:
    """Room for n experts in each layer."""
    return Budget.parse(f"{n * 2 * EXPERT_BYTES}B")


@torch.no_grad()
def scores(model: Any, top_k: int = 2) -> torch.Tensor:
    memory, parts = None, []
    for ids_BS in TOKENS:
        output = model(ids_BS, memory=memory, top_k=top_k, return_logits=True)
        memory = output.memory
        parts.append(output.logits_BSV)
    return torch.stack(parts)


@pytest.mark.parametrize("n_slots", range(1, N_EXPERTS + 1))
@pytest.mark.parametrize("policy", POLICIES)
def test_scores_are_those_of_the_resident_model(folder: Path, n_slots: int, policy: str) -> None:
    expected = scores(megamoe.load_model(folder))
    offloaded = OffloadedModel(folder, slots_of(n_slots), policy, in_background=False)
    for slots in offloaded.slots:
        assert slots.n_slots == n_slots
        slots.calls = []
    assert torch.equal(scores(offloaded.model), expected)
    for slots in offloaded.slots:
        assert slots.calls is not None
        traffic = slots.traffic
        assert len(slots.calls) == len(TOKENS)
        assert traffic.misses == count_misses(slots.calls, n_slots, POLICIES[policy]())
        assert traffic.hits + traffic.misses == sum(map(len, slots.calls))
        assert traffic.loads == traffic.misses
        assert traffic.n_bytes == traffic.loads * slots.stored.n_bytes
        assert traffic.evictions == max(0, traffic.loads - n_slots)
        assert traffic.late == 0


@pytest.mark.parametrize("n_slots", [1, 2, 4, N_EXPERTS])
def test_no_expectation_changes_scores(folder: Path, n_slots: int) -> None:
    expected = scores(megamoe.load_model(folder))
    draws = torch.Generator().manual_seed(n_slots)
    for _ in range(5):
        offloaded = OffloadedModel(folder, slots_of(n_slots))
        for slots in offloaded.slots:
            for _ in range(len(TOKENS)):
                slots.expect(torch.randperm(N_EXPERTS, generator=draws)[:4].tolist())
        assert torch.equal(scores(offloaded.model), expected)
        offloaded.close()
        assert torch.equal(scores(offloaded.model), expected)


def test_what_was_loaded_before_is_no_miss(folder: Path) -> None:
    model = megamoe.load_model(folder)
    with torch.no_grad():
        routings = model(TOKENS[0], top_k=1).routings
    needed = [routing.expert_ids_TK.unique().tolist() for routing in routings]
    offloaded = OffloadedModel(folder, slots_of(max(map(len, needed))), in_background=False)
    for slots, experts in zip(offloaded.slots, needed, strict=True):
        slots.expect(experts)
        slots.load_expected()
    with torch.no_grad():
        offloaded.model(TOKENS[0], top_k=1)
    traffic = offloaded.traffic
    assert (traffic.hits, traffic.misses, traffic.late) == (sum(map(len, needed)), 0, 0)
    assert traffic.loads == traffic.hits
    assert traffic.stall == 0


def test_what_is_expected_takes_no_slot_of_a_call_under_way(folder: Path) -> None:
    slots = OffloadedModel(folder, slots_of(2), in_background=False).slots[0]
    slots.expect([0, 1])
    slots.expect([2, 3])
    slots.load_expected()
    with slots.call([0, 1]) as fetch:
        fetch(0)
        slots.load_expected()
        assert slots.traffic.loads == 2
        fetch(1)
    slots.load_expected()
    assert slots.traffic.loads == 4
    with slots.call([1, 3]) as fetch:
        fetch(1)
        fetch(3)
    assert (slots.traffic.hits, slots.traffic.misses) == (3, 1)


def test_all_experts_in_slots_are_loaded_once(folder: Path) -> None:
    offloaded = OffloadedModel(folder, Budget.parse("100%"), in_background=False)
    scores(offloaded.model, top_k=N_EXPERTS)
    scores(offloaded.model, top_k=N_EXPERTS)
    assert offloaded.traffic.loads == N_EXPERTS * len(offloaded.slots)
    assert offloaded.traffic.evictions == 0
    assert offloaded.traffic.hit_rate == 1 - 1 / (2 * len(TOKENS))


def test_more_layers_than_may_wait_hold_nobody_up(folder: Path) -> None:
    offloaded = OffloadedModel(folder, slots_of(2))
    for _ in range(WAITING_LAYERS):
        for slots in offloaded.slots:
            slots.expect([0, 5])
    offloaded.close()
    offloaded.slots[0].expect([1])
    assert torch.equal(scores(offloaded.model), scores(megamoe.load_model(folder)))


def test_a_program_ends_without_closing_anything(folder: Path) -> None:
    program = f"""
from megamoe.serve.budget import Budget
from megamoe.serve.loader import WAITING_LAYERS
from megamoe.serve.offload import OffloadedModel

offloaded = OffloadedModel({str(folder)!r}, Budget.parse("50%"))
for _ in range(100):
    for slots in offloaded.slots:
        slots.expect(range(6))
raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_model(folder: Path, tmp_path: Path, dtype: str) -> None:
    convert("export", folder, tmp_path / "exported", "--dtype", dtype)
    offloaded = OffloadedModel(tmp_path / "exported", slots_of(2))
    assert torch.equal(scores(offloaded.model), scores(megamoe.load_model(tmp_path / "exported")))
    offloaded.close()


@pytest.mark.parametrize(
    ("text", "n_slots"),
    [("30%", 3), ("39.9%", 3), ("100%", 10), ("900%", 10), (f"{4 * 2 * EXPERT_BYTES}B", 4), ("4.48KB", 2)],
)
def test_slots_that_a_budget_has_room_for(tmp_path: Path, text: str, n_slots: int) -> None:
    folder = write_language_model(tmp_path / "best", moe={"layers": "all", "n_experts": 10})
    offloaded = OffloadedModel(folder, Budget.parse(text), in_background=False)
    assert [slots.n_slots for slots in offloaded.slots] == [n_slots] * 2
    assert offloaded.n_bytes == n_slots * 2 * EXPERT_BYTES


@pytest.mark.parametrize("router", ["smoe", "cosine", "sigma", "switch", "dense", "random", "hash"])
def test_other_policies(tmp_path: Path, router: str) -> None:
    config = from_dict(RUN | {"moe": RUN["moe"] | {"router": {"name": router}}})
    config = replace(config, model=replace(config.model, vocab_size=VOCAB_SIZE))
    model = TransformerXL(config.model, config.moe, seed=config.training.seed).eval()
    offloaded = OffloadedModel(write_model(tmp_path / "best", config, model), Budget.parse("50%"))
    assert torch.equal(scores(offloaded.model), scores(model))
    offloaded.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1B",
            "budget = 1B: no room for one expert in each of 2 layers; give at least 2240 bytes, or 0.1667",
        ),
        ("5%", "budget = 5%: no room for one expert"),
        ("0%", "budget = '0%': give bytes, as 64MiB, or a share of all experts, as 25%"),
        ("many", "budget = 'many': give bytes"),
        ("12", "budget = '12': give bytes"),
    ],
)
def test_refusals_of_budgets(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        OffloadedModel(folder, Budget.parse(text))


def test_refusal_of_a_model_without_experts(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "best", moe={"layers": "none"})
    with pytest.raises(ConfigError, match=r"^budget = 1MiB: this model has no experts"):
        OffloadedModel(folder, Budget.parse("1MiB"))


def test_files_that_are_damaged_while_serving(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "best"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    offloaded = OffloadedModel(damaged, slots_of(2))
    for file in damaged.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"\0" * 100)
    for slots in offloaded.slots:
        slots.expect(range(2))
    with pytest.raises(CheckpointError, match=r"^checkpoint '.*best': .*safetensors: "):
        scores(offloaded.model)
    offloaded.close()
