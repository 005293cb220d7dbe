"""A comparison from beginning to end: everything is checked, then it trains, then it reports."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from megamoe.compare.contestants import Budget, contestants
from megamoe.compare.plots import plot_comparison
from megamoe.compare.report import markdown, terminal_table
from megamoe.compare.runs import Pool, folder_of
from megamoe.compare.summary import summarize
from megamoe.config.load import read_file
from megamoe.config.schema import RunConfig
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import DEFAULT_DS_CONFIG, resolve_ds_config
from megamoe.training.environment import describe_environment, machine_line
from megamoe.training.run_folder import write_json
from megamoe.training.session import read_corpus
from megamoe.training.terminal import open_terminal


def compare(
    base: RunConfig,
    routers: Sequence[str],
    *,
    n_seeds: int,
    budget: Budget,
    jobs: int = 1,
    ranks: int = 1,
    ds_config: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Train every policy with every seed, or what is left of it, and write the report.

    Args:
        base: the run that all share, with a name.
        routers: policies, see `contestants.read_router`.
        n_seeds: seeds `training.seed`, `training.seed` + 1, ...
        budget: what is equal for all, see `contestants`.
        jobs: runs at a time.
        ranks: processes of each run.
        ds_config: a DeepSpeed config file; empty: the default one.
        command: what was called, for the report.

    Returns:
        What compare.json holds.

    Raises:
        ConfigError: something does not fit, in which case nothing was trained; or a run failed.
        StoppedError: a signal stopped it; the same call goes on.
    """
    base, _ = read_corpus(base)
    found = contestants(base, routers, budget)
    ds = read_file(ds_config) if ds_config else DEFAULT_DS_CONFIG
    for one in found:
        resolve_ds_config(one.run, ds, ranks, Device.detect())
    seeds = range(base.training.seed, base.training.seed + n_seeds)
    # All policies of one seed before the next seed, so that a cut comparison is a fair one of fewer seeds.
    Pool(jobs, ranks, ds_config).train([one.seeded(seed) for seed in seeds for one in found])
    return report(base, summarize(base, found, list(seeds), budget), jobs, command)


def report(base: RunConfig, summary: dict[str, Any], jobs: int, command: str) -> dict[str, Any]:
    """Write compare.json, compare.md and the images, and print the table."""
    folder = folder_of(base)
    environment = describe_environment()
    facts = {"date": date.today().isoformat(), "command": command, "jobs": jobs, "environment": environment}
    summary = facts | summary
    write_json(folder / "compare.json", summary)
    images = plot_comparison(summary, folder)
    where = f"{summary['date']}, {machine_line(environment)}, {jobs} runs at a time."
    (folder / "compare.md").write_text(markdown(summary, images, command, where), encoding="utf-8")
    console = open_terminal()
    console.print(terminal_table(summary))
    console.print(f"\n{folder}/compare.md, compare.json, {', '.join(image.name for image in images)}")
    return summary
