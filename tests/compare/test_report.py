"""What a report tells apart, on figures that are known."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megamoe.compare.report import markdown, noise, ranked
from megamoe.compare.summary import _spread, figure_at
from megamoe.config import load_config


def entry(label: str, by_k: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "label": label, "figures": {k: _spread(values) for k, values in by_k.items()},
        "d_expert": 32, "steps": 10, "tokens": 10240, "trainable_parameters": 1, "frozen_parameters": 0,
        "tokens_per_second": 5.0,
        "expert_teraflops": 1.0, "runs": [{"diverged": False} for _ in range(3)],
        "routing": dict.fromkeys(
            ("max_over_mean", "load_entropy", "router_entropy", "dead", "drop_rate", "unrouted", "choices",
             "agreement")
        ),
    }  # fmt: skip


def summary_of(*entries: dict[str, Any], n_seeds: int = 3) -> dict[str, Any]:
    return {
        "corpus": "text", "metric": "bpc", "budget": "tokens", "seeds": list(range(n_seeds)), "top_k": 2,
        "n_experts": 16, "contestants": list(entries), "config": load_config(preset="tiny_enwik8").to_dict(),
    }  # fmt: skip


def test_noise_is_what_policies_and_seeds_do_not_explain():
    rng = np.random.default_rng(0)
    policies, seeds = np.array([2.0, 2.1, 2.3, 2.2]), np.array([0.5, 0.0, -0.4])
    figures = policies[:, None] + seeds + 0.01 * rng.standard_normal((4, 3))
    found = noise(summary_of(*(entry(f"p{i}", {"2": list(row)}) for i, row in enumerate(figures))))
    assert found is not None
    # The residuals of the linear model with an effect for each policy and each seed.
    design = np.array(
        [[i == p for i in range(4)] + [j == s for j in range(1, 3)] for p in range(4) for s in range(3)],
        float,
    )
    residuals = np.linalg.lstsq(design, figures.ravel(), rcond=None)[1]
    deviation = math.sqrt(float(residuals[0]) / (12 - 6))
    assert found.deviation == pytest.approx(deviation)
    assert found.smallest == pytest.approx(stats.t.ppf(0.975, 6) * deviation * math.sqrt(2 / 3))
    # Each policy's own part of it; pooled they are the whole.
    assert np.mean(np.square([*found.by_label.values()])) == pytest.approx(deviation**2)
    rest = figures - figures.mean(1, keepdims=True) - figures.mean(0) + figures.mean()
    assert found.by_label["p2"] == pytest.approx(math.sqrt(float(rest[2] @ rest[2]) * 4 / 6))


def test_with_two_policies_it_is_the_paired_t_test():
    a, b = [2.0, 2.2, 2.5, 2.1], [2.05, 2.28, 2.51, 2.19]
    found = noise(summary_of(entry("a", {"2": a}), entry("b", {"2": b}), n_seeds=4))
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found is not None
    assert found.smallest == pytest.approx((interval.high - interval.low) / 2)


def test_nothing_is_known_of_one_seed_or_one_policy():
    assert noise(summary_of(entry("a", {"2": [2.0]}), entry("b", {"2": [3.0]}), n_seeds=1)) is None
    assert noise(summary_of(entry("a", {"2": [2.0, 2.1, 2.2]}))) is None
    text = markdown(summary_of(entry("a", {"2": [2.0]}), entry("b", {"2": [3.0]}), n_seeds=1), [], "", "")
    assert "no difference is told apart" in text


def test_the_report_says_who_is_alike():
    close = summary_of(
        entry("best", {"2": [2.00, 2.10, 2.20], "4": [2.0, 2.1, 2.2]}),
        entry("near", {"2": [2.01, 2.09, 2.22]}),
        entry("far", {"2": [3.00, 3.11, 3.19]}),
        entry("own_k", {"1": [2.5, 2.6, 2.7]}),
    )
    assert [one["label"] for one in ranked(close)] == ["best", "near", "own_k", "far"]
    text = markdown(close, [], "megamoe compare", "here")
    assert "The best, best, is not told apart from near." in text
    assert "| best |  | 2.1000 ± 0.1000 | 2.1000 ± 0.1000 | 0.0017 |" in text
    assert "| own_k | 2.6000 ± 0.1000 |  |  | 0.0017 |" in text
    assert figure_at(close["contestants"][3], 2)[0] == "1"


def test_a_policy_that_diverged_is_counted_and_not_ranked():
    lost = entry("lost", {})
    for run in lost["runs"]:
        run["diverged"] = True
    found = summary_of(entry("a", {"2": [2.0, 2.1, 2.2]}), lost)
    assert [one["label"] for one in ranked(found)] == ["a", "lost"]
    assert "Diverged: lost (3 of 3)." in markdown(found, [], "", "")
