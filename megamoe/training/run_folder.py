"""Where everything of a run lies. docs/training.md shows the tree."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.config.schema import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """The files and folders of the run in `root`; naming them creates nothing."""

    root: Path

    @classmethod
    def of(cls, run: RunConfig) -> "RunFolder":
        """The folder that `run.output_dir` and `run.name` name."""
        return cls(Path(run.output_dir) / run.name)

    def holds(self, path: Path) -> bool:
        """Whether `path` lies in this folder."""
        return path.resolve().is_relative_to(self.root.resolve())

    @property
    def config(self) -> Path:
        """The resolved run config."""
        return self.root / "config.json"

    @property
    def ds_config(self) -> Path:
        """The resolved DeepSpeed config."""
        return self.root / "ds_config.json"

    @property
    def environment(self) -> Path:
        """Versions, devices and launch environment, see `megamoe.training.environment`."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per log interval and per evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """Test figures by k."""
        return self.root / "results.json"

    @property
    def log(self) -> Path:
        """What the console showed."""
        return self.root / "train.log"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-*`` checkpoints."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """Checkpoint with the lowest validation loss."""
        return self.root / "best"

    @property
    def heartbeats(self) -> Path:
        """Folder of the ranks' signs of life, see `megamoe.training.heartbeat`."""
        return self.root / "heartbeats"

    @property
    def plots(self) -> Path:
        """Folder of images."""
        return self.root / "plots"

    @property
    def curves(self) -> Path:
        """The image of a finished run."""
        return self.plots / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def rooms(self) -> Path:
        """Where the time of a profiled step went; in the folder of a profile."""
        return self.root / "rooms.json"

    def trace(self, rank: int) -> Path:
        """What `rank` recorded of a profiled step; in the folder of a profile."""
        return self.root / f"rank-{rank:05d}.trace.json"

    def is_scored(self, step: int) -> bool:
        """Whether the run was scored after `step`, and everything written that comes then."""
        if not (self.results.exists() and self.curves.exists()):
            return False
        return json.loads(self.results.read_text(encoding="utf-8"))["steps"] == step


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON under a temporary name and rename, so that no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
