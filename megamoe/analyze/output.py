"""An analysis as a folder: modularity.md, modularity.json and images."""

from datetime import date
from pathlib import Path
from typing import Any

from megamoe.analyze.plots import plot_analysis
from megamoe.analyze.report import markdown
from megamoe.convert.neutral_writer import new_folder
from megamoe.training.environment import describe_environment, machine_line
from megamoe.training.run_folder import write_json


def write_analysis(folder: Path, found: dict[str, Any], command: str) -> None:
    """Write all of it or nothing.

    Args:
        folder: to make; it must not exist yet.
        found: what `analyze` gives.
        command: that made it, for the report.

    Raises:
        CheckpointError: the folder exists, or the disk refuses.
    """
    environment = describe_environment()
    facts = {"date": date.today().isoformat(), "command": command, "environment": environment}
    with new_folder(folder) as unfinished:
        write_json(unfinished / "modularity.json", facts | found)
        images = plot_analysis(found, unfinished)
        where = f"{facts['date']}, {machine_line(environment)}."
        report = markdown(found, images, command, where)
        (unfinished / "modularity.md").write_text(report, encoding="utf-8")
