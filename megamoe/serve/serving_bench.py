"""What serving from few slots costs against everything in memory, each way measured in a fresh process."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megamoe.checkpoint.load import open_model
from megamoe.errors import ConfigError
from megamoe.serve.budget import Budget
from megamoe.serve.generation import experts_to_use, text_span
from megamoe.serve.learning import read_text_of
from megamoe.serve.measurement import HINT, ON_DEMAND, ORACLE, REPLACE, RESIDENT, Measured, Task, measure
from megamoe.serve.offload import load_offloaded
from megamoe.serve.predictor_file import load_predictor
from megamoe.serve.replacement import POLICIES, Belady, count_misses
from megamoe.serve.workload import Reading
from megamoe.training.evaluation import in_metric


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is compared.

    Attributes:
        budgets: memory for experts, one after the other.
        n_tokens: tokens of the text that are read.
        at_once: tokens read at once; 1 as while text is generated.
        policy: which expert makes room, a name in `POLICIES`.
        predictor: folder of a predictor; None leaves out the modes that need one.
        k: experts per token; None means `moe.top_k`.
        split: "valid" or "test".

    Raises:
        ConfigError: a number is out of range.
    """

    budgets: tuple[Budget, ...]
    n_tokens: int = 2000
    at_once: int = 1
    policy: str = "lru"
    predictor: Path | None = None
    k: int | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        for name, at_least in (("n_tokens", 2), ("at_once", 1)):
            if getattr(self, name) < at_least:
                raise ConfigError(f"{name} = {getattr(self, name)}: give a number from {at_least} on")


def bench_serving(
    checkpoint: str | Path,
    settings: BenchSettings,
    overrides: Iterable[str] = (),
    after: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure all modes at all budgets, and count what other policies would have missed.

    Args:
        checkpoint: as `load_model` takes it.
        settings: what is compared.
        overrides: ``data.option=value``, over what the run had.
        after: told each row when it is there.

    Returns:
        what the report is made of, plain values: `rows`, one for each mode and budget, `policies`, misses
        by budget and policy, and what was measured.

    Raises:
        MegaMoEError: there is no such checkpoint or predictor, or a budget is too small.
    """
    reader = open_model(checkpoint)
    run, corpus = read_text_of(reader, overrides)
    top_k = experts_to_use(run, settings.k)
    _require_loadable(reader.folder, settings)
    ids_N = corpus.tokens[settings.split][: settings.n_tokens + 1]
    reading = Reading(settings.at_once, top_k, reader.state.step, text_span(run))
    resident = Task(checkpoint=reader.folder, ids_N=ids_N, reading=reading, mode=RESIDENT)
    rows: list[dict[str, Any]] = []
    policies: list[dict[str, Any]] = []

    def add(task: Task) -> Measured:
        measured = in_fresh_process(task)
        expected = rows[0]["losses_sha256"] if rows else measured.losses_sha256
        rows.append(_row(task, measured, corpus.metric) | {"same": measured.losses_sha256 == expected})
        after(rows[-1])
        return measured

    add(resident)
    for budget in settings.budgets:
        task = replace(
            resident, mode=ON_DEMAND, budget=budget, policy=settings.policy, predictor=settings.predictor
        )
        on_demand = add(task)
        if settings.predictor is not None:
            add(replace(task, mode=HINT))
        add(replace(task, mode=ORACLE, calls=on_demand.calls))
        if settings.predictor is not None:
            add(replace(task, mode=REPLACE))
        assert on_demand.n_slots is not None
        policies.append({"budget": str(budget)} | _misses(on_demand.calls, on_demand.n_slots))
    return {
        "checkpoint": str(reader.folder), "corpus": corpus.name, "metric": corpus.metric,
        "split": settings.split, "tokens": len(ids_N) - 1, "at_once": settings.at_once, "top_k": top_k,
        "n_experts": run.moe.n_experts, "policy": settings.policy, "unit": corpus.unit,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__} on"
        f" {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} at the end",
        "rows": rows, "policies": policies,
    }  # fmt: skip


def _require_loadable(checkpoint: Path, settings: BenchSettings) -> None:
    """Refuse budgets and a predictor that do not fit the model, before time is spent on others."""
    for budget in settings.budgets:
        model = load_offloaded(checkpoint, budget)
    if settings.predictor is not None:
        load_predictor(settings.predictor, model)


def in_fresh_process(task: Task) -> Measured:
    """`measure` where nothing has been in memory before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, task).result()


def _row(task: Task, measured: Measured, metric: str) -> dict[str, Any]:
    values = vars(measured) | {"mode": task.mode, "budget": None if task.budget is None else str(task.budget)}
    n_tokens = len(task.ids_N) - 1
    values |= {
        "tokens_per_second": n_tokens / measured.seconds,
        metric: in_metric(measured.nats, metric),
        "bytes_per_token": measured.traffic.get("n_bytes", 0) / n_tokens,
    }
    del values["calls"]
    return values


def _misses(calls: Sequence[Sequence[Sequence[int]]], n_slots: int) -> dict[str, int]:
    """Loads on demand by policy, over all layers."""
    counts = {
        name: sum(count_misses(of_layer, n_slots, policy()) for of_layer in calls)
        for name, policy in POLICIES.items()
    }
    return counts | {
        "belady": sum(count_misses(of_layer, n_slots, Belady(of_layer)) for of_layer in calls),
        "needed": sum(len(needed) for of_layer in calls for needed in of_layer),
    }
