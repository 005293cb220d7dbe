"""What the runs of a comparison gave, as plain values: compare.json."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megamoe.compare.contestants import Budget, Contestant, plain
from megamoe.compare.runs import DIVERGED
from megamoe.config.schema import RunConfig
from megamoe.moe.routers import resolve_options
from megamoe.training.metrics_file import read_metrics
from megamoe.training.run_folder import RunFolder

LAST_LINES = 5
"""Log lines at the end of a run whose mean routing is reported."""
HEALTH = ("max_over_mean", "load_entropy", "router_entropy", "dead", "drop_rate", "unrouted", "choices")


def summarize(
    base: RunConfig, found: Sequence[Contestant], seeds: Sequence[int], budget: Budget
) -> dict[str, Any]:
    """Figures of every contestant and seed, with mean and spread.

    All runs are finished or have diverged.
    """
    entries = [_contestant(contestant, seeds) for contestant in found]
    scored = [run for entry in entries for run in entry["runs"] if not run["diverged"]]
    return {
        "corpus": scored[0]["corpus"] if scored else "",
        "metric": scored[0]["metric"] if scored else "",
        "budget": budget,
        "seeds": list(seeds),
        "top_k": base.moe.top_k,
        "n_experts": base.moe.n_experts,
        "segment_len": base.model.segment_len,
        "batch_size": base.training.batch_size,
        "config": base.to_dict(),
        "contestants": entries,
    }


def _contestant(contestant: Contestant, seeds: Sequence[int]) -> dict[str, Any]:
    run = contestant.run
    runs = [_run(contestant.seeded(seed)) for seed in seeds]
    scored = [one for one in runs if not one["diverged"]]
    ks = scored[0]["figures"] if scored else {}
    tokens = run.training.max_steps * run.training.batch_size * run.model.segment_len
    return {
        "label": contestant.label,
        "router": run.moe.router.name,
        "options": plain(resolve_options(run.moe.router)),
        "steps": run.training.max_steps,
        "tokens": tokens,
        "d_expert": run.moe.d_expert,
        "trainable_parameters": contestant.parameters.trainable,
        "frozen_parameters": contestant.parameters.frozen,
        "figures": {k: _spread([one["figures"][k] for one in scored]) for k in ks},
        "routing": {name: _mean([one["routing"][name] for one in scored]) for name in (*HEALTH, "agreement")},
        "tokens_per_second": _mean([one["tokens_per_second"] for one in scored]),
        "expert_teraflops": _teraflops(contestant, tokens, scored),
        "runs": runs,
    }


def _run(run: RunConfig) -> dict[str, Any]:
    folder, seed = RunFolder.of(run), run.training.seed
    if (folder.root / DIVERGED).exists():
        return {"seed": seed, "diverged": True, **json.loads((folder.root / DIVERGED).read_text())}
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    lines = read_metrics(folder.metrics)
    logged = [line for line in lines if "train/tokens_per_second" in line]
    return {
        "seed": seed,
        "diverged": False,
        "corpus": results["corpus"],
        "metric": results["metric"],
        "steps": results["steps"],
        "best_step": results["best_step"],
        "figures": results[f"{results['metric']}_by_k"],
        "tokens_per_second": statistics.median(line["train/tokens_per_second"] for line in logged),
        "routing": _routing(run, logged[-LAST_LINES:]),
        "validation": _validation(lines, results["metric"]),
    }


def _routing(run: RunConfig, lines: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean over the last lines and all mixture layers."""
    layers = run.moe.layer_indices(run.model.n_layers)
    found: dict[str, float | None] = {
        name: _mean([line.get(f"routing/layer_{layer}/{name}") for line in lines for layer in layers])
        for name in HEALTH
    }
    return found | {"agreement": _mean([line.get("routing/agreement") for line in lines])}


def _validation(lines: Sequence[dict[str, Any]], metric: str) -> dict[str, list[list[float]]]:
    """Steps and figures of the validation split by k, ``{"2": [[100, 3.1], ...]}``."""
    curves: dict[str, list[list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            stem, found, k = name.partition(f"valid/{metric}_k")
            if found and not stem and value is not None:
                curves.setdefault(k, []).append([line["step"], value])
    return curves


def _teraflops(contestant: Contestant, tokens: int, scored: Sequence[dict[str, Any]]) -> float | None:
    """Floating-point operations in experts over one training run, in units of 10^12.

    A multiplication and an addition are two; the backward pass takes twice the forward pass. Where the
    number of experts is not known before training, it is that of the last log lines.
    """
    run = contestant.run
    experts = contestant.experts_computed
    if experts is None:
        experts = _mean([one["routing"]["choices"] for one in scored])
    if experts is None:
        return None
    n_layers = len(run.moe.layer_indices(run.model.n_layers))
    per_expert = 3 * 4 * run.model.d_model * run.moe.d_expert
    return tokens * n_layers * experts * per_expert / 1e12


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds; its standard error from the deviation of single seeds, with two or more."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "deviation": deviation, "error": error, "seeds": list(values)}


def figure_at(entry: dict[str, Any], top_k: int) -> tuple[str, dict[str, Any]] | None:
    """The k and figures that stand for `entry` where `top_k` is asked; a policy of its own k has one."""
    figures = entry["figures"]
    if not figures:
        return None
    k = str(top_k) if str(top_k) in figures else max(figures, key=int)
    return k, figures[k]
