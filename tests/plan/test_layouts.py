"""The search for layouts, times, and refusals that say what would do."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamoe.config import load_config
from megamoe.errors import ConfigError
from megamoe.parallel.ds_config import DEFAULT_DS_CONFIG, Layout
from megamoe.plan.devices import GPUS, Cluster, accelerator
from megamoe.plan.estimate import estimate
from megamoe.plan.inventory import inventory
from megamoe.plan.layouts import Plan, plan, require_fit
from megamoe.plan.scaling import scaling
from megamoe.plan.workload import checkpointing
from tests.plan.runs import CPU, small_run

H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def xl() -> Plan:
    return plan(load_config(preset="xl_enwik8"), DEFAULT_DS_CONFIG, Cluster(8, 8, H100))


def test_the_best_fit_and_are_the_fastest_first(xl: Plan) -> None:
    assert len(xl.best) == 3
    assert all(one.fits for one in xl.best)
    steps = [one.time.step for one in xl.best]
    assert steps == sorted(steps)
    assert xl.chosen.fits
    assert steps[0] <= xl.chosen.time.step


def test_no_layout_by_hand_beats_the_best(xl: Plan) -> None:
    run, known = checkpointing(xl.chosen.run, False), inventory(xl.chosen.run)
    for ep_size in (1, 8, 64):
        for micro_batch in (1, 2, 8):
            layout = Layout(64, ep_size, micro_batch, 8 // micro_batch, 1, torch.bfloat16)
            other = estimate(run, layout, xl.chosen.cluster, known=known)
            assert not other.fits or other.time.step >= xl.best[0].time.step


def test_the_largest_micro_batch_fits_and_one_more_does_not(xl: Plan) -> None:
    known = inventory(xl.chosen.run)

    def fits(streams: int) -> bool:
        layout = replace(xl.chosen.layout, micro_batch_size=streams)
        return estimate(xl.chosen.run, layout, xl.chosen.cluster, known=known).fits

    assert xl.largest_micro_batch > 1
    assert fits(xl.largest_micro_batch)
    assert not fits(xl.largest_micro_batch + 1)


def test_a_plan_that_does_not_fit_says_what_would(xl: Plan) -> None:
    require_fit(xl)
    run = load_config(preset="xl_enwik8", overrides=["training.activation_checkpointing=false"])
    short = plan(run, DEFAULT_DS_CONFIG, Cluster(8, 8, replace(H100, memory=14e9)))
    assert not short.chosen.fits
    with pytest.raises(ConfigError, match=r"^memory: a rank needs .* more than .*; moe.ep_size=\d+ .*=true"):
        require_fit(short)


def test_more_nodes_are_named_where_no_layout_fits() -> None:
    made = plan(load_config(preset="xxl_enwik8"), DEFAULT_DS_CONFIG, Cluster(1, 8, H100))
    with pytest.raises(ConfigError, match=r"no layout of 1 nodes fits; --nodes \d+ does"):
        require_fit(made)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.ep_size=48"], r"^moe.ep_size = 48: .*such as 32 or 64"),
        (["training.batch_size=100"], r"^training.batch_size = 100: give a multiple of the 64 ranks"),
        (["data.dataset=text"], r"^model.vocab_size = 0: not known"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    ds: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if overrides == ["data.dataset=text"]:
        overrides = [*overrides, "data.tokenizer=sentencepiece"]
    with pytest.raises(ConfigError, match=message):
        plan(load_config(preset="xl_enwik8", overrides=overrides), ds, Cluster(8, 8, H100))


def test_an_unknown_device_is_met_with_the_nearest() -> None:
    assert accelerator("H100", 8) == H100
    with pytest.raises(ConfigError, match=r"^--device = 'h10': unknown, did you mean 'h100'\?"):
        accelerator("h10", 8)
    with pytest.raises(ConfigError, match="--nodes = 0"):
        Cluster(0, 8, H100)


def test_this_cpu_is_measured_and_shared_by_its_ranks() -> None:
    alone, shared = accelerator("cpu", 1), accelerator("cpu", 2)
    assert shared.memory == alone.memory / 2
    assert alone.peak[torch.float32] > 1e9
    assert alone.bandwidth > 1e8


def test_a_step_takes_what_its_parts_take() -> None:
    run, cluster = small_run(training={"batch_size": 4}), Cluster(2, 2, CPU)
    layout = Layout(4, 2, 1, 1, 1, torch.float32)
    time = estimate(run, layout, cluster).time
    assert time.step == pytest.approx(time.compute + time.exposed)
    assert time.all_to_all > 0
    faster = estimate(run, layout, cluster, efficiency=1.0).time
    assert faster.products == pytest.approx(0.8 * time.products)
    hidden = estimate(run, layout, cluster, ds={"zero_optimization": {"overlap_comm": True}}).time
    assert hidden.hidden > 0
    assert hidden.reduction + hidden.hidden == pytest.approx(time.reduction)
    assert 0 < time.peak_share < 0.8


def test_a_run_takes_the_time_of_its_schedule() -> None:
    constant = small_run(training={"batch_size": 1, "max_steps": 1000})
    growing = small_run(
        training={"batch_size": 1, "max_steps": 1000},
        moe={"schedule": {"mode": "linear_increase", "min_k": 1, "max_k": 8}},
    )
    slow = replace(CPU, peak={torch.float32: 1e9})  # else starting kernels would take longest at any k
    layout, cluster = Layout(1, 1, 1, 1, 1, torch.float32), Cluster(1, 1, slow)
    found = estimate(constant, layout, cluster)
    assert found.days == pytest.approx(found.time.step * 1000 / 86400)
    changing = estimate(growing, layout, cluster)
    assert changing.top_k == 8
    assert found.days < changing.days < changing.time.step * 1000 / 86400


def test_scaling_keeps_streams_or_the_batch() -> None:
    run = load_config(preset="xl_enwik8")
    rows = scaling(run, DEFAULT_DS_CONFIG, Cluster(8, 8, H100), [8, 16], None)
    batches = {(row.kind, row.one.cluster.nodes): row.one.run.training.batch_size for row in rows}
    assert batches == {("weak", 8): 512, ("weak", 16): 1024, ("strong", 8): 512, ("strong", 16): 512}
    efficiency = {(row.kind, row.one.cluster.nodes): row.efficiency for row in rows}
    assert efficiency["weak", 8] == efficiency["strong", 8] == 1
    assert efficiency["strong", 16] < efficiency["weak", 16] <= 1.05
