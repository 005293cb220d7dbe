"""What a run has left in its folder, as far as two equal runs must leave the same."""

from pathlib import Path
from typing import Any

from megamoe.training.metrics_file import read_metrics

# What differs between two equal runs: clocks, memory, and churn, which compares with the log line before.
UNREPEATABLE = ("time/", "memory/", "train/tokens_per_second")


def repeatable(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs between two equal runs."""
    return [
        {
            name: value
            for name, value in line.items()
            if not name.startswith(UNREPEATABLE) and "churn" not in name
        }
        for line in read_metrics(run / "metrics.jsonl")
    ]


def steps_logged(run: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)


def hidden(run: Path) -> list[str]:
    """Temporary files and folders that are left, relative to `run`."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock")
