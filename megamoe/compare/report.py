"""A comparison as people read it: compare.md, and the table on the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megamoe.compare.summary import figure_at
from megamoe.training.report import markdown_table


def ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Contestants by their figure at the run's k, best first; those that diverged with every seed last."""

    def key(entry: dict[str, Any]) -> float:
        found = figure_at(entry, summary["top_k"])
        return found[1]["mean"] if found else math.inf

    return sorted(summary["contestants"], key=key)


@dataclass(frozen=True)
class Noise:
    """How far a figure at the run's k is off by chance.

    A seed shifts all policies alike, because they share initial values and data, and that part cancels in a
    comparison; what is left after the means of policies and of seeds is noise.

    Attributes:
        deviation: standard deviation of what is left, pooled over policies.
        smallest: difference between two means over seeds that chance reaches in one case of twenty.
        by_label: standard deviation of what is left of each policy, from few seeds and so itself uncertain.
    """

    deviation: float
    smallest: float
    by_label: dict[str, float]


def seeds_of(summary: dict[str, Any]) -> str:
    """How many seeds, in words."""
    n_seeds = len(summary["seeds"])
    return f"{n_seeds} seed{'s' * (n_seeds != 1)}"


def noise(summary: dict[str, Any]) -> Noise | None:
    """Of the policies scored with all seeds; None with one seed or one policy: then nothing is known."""
    n_seeds = len(summary["seeds"])
    found = {entry["label"]: figure_at(entry, summary["top_k"]) for entry in summary["contestants"]}
    scored = {
        label: one[1]["seeds"] for label, one in found.items() if one and len(one[1]["seeds"]) == n_seeds
    }
    figures_PS = np.array([*scored.values()])
    if len(figures_PS) < 2 or n_seeds < 2:
        return None
    left_PS = figures_PS - figures_PS.mean(1, keepdims=True) - figures_PS.mean(0) + figures_PS.mean()
    freedom = (len(figures_PS) - 1) * (n_seeds - 1)
    deviation = math.sqrt(float(np.square(left_PS).sum()) / freedom)
    from scipy.stats import t

    # Over P policies, left_PS loses a share of 1 / P to the means of seeds.
    own_P = np.sqrt(np.square(left_PS).sum(1) * len(figures_PS) / freedom)
    return Noise(
        deviation=deviation,
        smallest=float(t.ppf(0.975, freedom)) * deviation * math.sqrt(2 / n_seeds),
        by_label=dict(zip(scored, own_P.tolist(), strict=True)),
    )


def terminal_table(summary: dict[str, Any]) -> Table:
    """Figures at the run's k, costs and balance, best first."""
    table = Table(
        title=f"test {summary['metric']} on {summary['corpus']}, {seeds_of(summary)}, equal"
        f" {summary['budget']}",
        caption=_verdict(summary), title_style="bold", title_justify="left", caption_justify="left",
    )  # fmt: skip
    header, rows = _figure_rows(summary)
    for place, title in enumerate(header):
        table.add_column(title, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(summary: dict[str, Any], images: Sequence[Path], command: str, where: str) -> str:
    """The report: figures with spread, what they tell apart, costs, routing."""
    metric, seeds = summary["metric"], summary["seeds"]
    parts = [
        f"# Routing policies on {summary['corpus']}",
        f"Test {metric}, lower is better, of {seeds_of(summary)} ({', '.join(map(str, seeds))}) each, at"
        f" equal {summary['budget']}. Mean ± standard deviation between seeds. All have the same data in"
        f" the same order, model, optimizer and schedule; {summary['n_experts']} experts,"
        f" k = {summary['top_k']}.",
        f"    {command}",
        where,
        "## Figures",
        markdown_table(*_figure_rows(summary)),
        _verdict(summary),
        _SCORED,
        "## Cost",
        markdown_table(*_cost_rows(summary)),
        _COST_NOTES,
        "## Routing",
        markdown_table(*_routing_rows(summary)),
        _ROUTING_NOTES,
    ]
    parts += [f"![{image.stem}]({image.name})" for image in images]
    return "\n\n".join(parts) + "\n"


_SCORED = """\
Scored are the best weights of each run, those with the lowest validation loss at evaluation.best_k. At a k
that was not trained with, a policy is asked for something it did not learn. A policy that decides its number
of experts itself has one figure, under that number."""

_COST_NOTES = """\
Parameters are those that are trained; frozen ones are saved with the model. Experts per token are those
computed in training, in forward and backward passes. TFLOPs are those of experts over one run. Tokens per
second are the median over a run's log lines, on a machine that may have done other work beside it."""

_ROUTING_NOTES = """\
Means over mixture layers and the last log lines of training. Load: the busiest expert over the mean (1 at
balance). Entropy: of the load, over ln E (1 at balance); of the router, in nats. Dead: experts of a layer
without a token in a micro-batch. Dropped: share of choices. Agreement: share of held-out tokens with the same
top expert in two neighbouring layers, about 1 / E where their choices have nothing to do with each other."""


def _verdict(summary: dict[str, Any]) -> str:
    """What the figures tell apart, and what not."""
    order = [entry for entry in ranked(summary) if entry["figures"]]
    diverged = [
        f"{entry['label']} ({sum(run['diverged'] for run in entry['runs'])} of {len(entry['runs'])})"
        for entry in summary["contestants"]
        if any(run["diverged"] for run in entry["runs"])
    ]
    lost = f" Diverged: {', '.join(diverged)}." if diverged else ""
    if not order:
        return f"No run was scored.{lost}"
    chance = noise(summary)
    if chance is None:
        return f"With one seed or one policy nothing is known about noise: no difference is told apart.{lost}"
    means = {entry["label"]: figure_at(entry, summary["top_k"])[1]["mean"] for entry in order}  # type: ignore[index]
    best = order[0]["label"]
    alike = [label for label, mean in means.items() if label != best and mean - means[best] < chance.smallest]
    return (
        f"Beyond what a seed does to all policies alike, a figure at k = {summary['top_k']} deviates by"
        f" {chance.deviation:.4f} (standard deviation, pooled over policies; each one's own is in the last"
        f" column), so two means over {seeds_of(summary)} are told apart from about {chance.smallest:.4f} on"
        f" (95 %, each pair by itself). The best, {best}, is "
        + (f"not told apart from {', '.join(alike)}." if alike else "told apart from all others.")
        + lost
    )


def _figure_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    ks = sorted({int(k) for entry in summary["contestants"] for k in entry["figures"]})
    chance = noise(summary)
    header = ["policy", *(f"k = {k}" for k in ks), "noise"]
    rows = [
        [
            entry["label"],
            *(_figure(entry["figures"].get(str(k)), summary["metric"]) for k in ks),
            _number(chance.by_label.get(entry["label"]) if chance else None, 4),
        ]
        for entry in ranked(summary)
    ]
    return header, rows


def _figure(found: dict[str, Any] | None, metric: str) -> str:
    if found is None:
        return ""
    digits = 2 if metric == "ppl" else 4
    spread = "" if found["deviation"] is None else f" ± {found['deviation']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


def _cost_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "policy", "parameters", "frozen", "expert width", "steps", "experts per token", "expert TFLOPs",
        "tokens per second",
    ]  # fmt: skip
    rows = []
    for entry in ranked(summary):
        per_expert = 12 * summary["config"]["model"]["d_model"] * entry["d_expert"]
        n_layers = _n_layers(summary)
        flops = entry["expert_teraflops"]
        experts = None if flops is None else flops * 1e12 / (entry["tokens"] * n_layers * per_expert)
        rows.append(
            [
                entry["label"],
                f"{entry['trainable_parameters']:,}",
                f"{entry['frozen_parameters']:,}",
                str(entry["d_expert"]),
                f"{entry['steps']:,}",
                _number(experts, 2),
                _number(flops, 3),
                _number(entry["tokens_per_second"], 0),
            ]
        )
    return header, rows


def _n_layers(summary: dict[str, Any]) -> int:
    from megamoe.config.load import from_dict

    run = from_dict(summary["config"])
    return len(run.moe.layer_indices(run.model.n_layers))


def _routing_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "policy", "load", "load entropy", "router entropy", "dead", "dropped", "unrouted", "choices",
        "agreement",
    ]  # fmt: skip
    rows = []
    for entry in ranked(summary):
        r = entry["routing"]
        entropy = r["load_entropy"]
        rows.append(
            [
                entry["label"],
                _number(r["max_over_mean"], 2),
                _number(None if entropy is None else entropy / math.log(summary["n_experts"]), 3),
                _number(r["router_entropy"], 3),
                _number(r["dead"], 2),
                _number(r["drop_rate"], 3),
                _number(r["unrouted"], 3),
                _number(r["choices"], 2),
                _number(r["agreement"], 3),
            ]
        )
    return header, rows


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
