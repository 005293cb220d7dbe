"""Every file in ds_configs/ trains a step on two ranks, or is refused because of this machine."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megamoe.errors import ConfigError
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.launch import read_launch, start
from tests.parallel.parity import NO_CLIP
from tests.parallel.runs import run_engine, run_plain, small_run
from tests.ranks import run_ranks

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
# DeepSpeed's autocast stays switched on for the rest of a process.
FILES.sort(key=lambda file: "autocast" in file.name)


def needs(ds: dict[str, Any]) -> str:
    """What of this machine a file cannot do without, if that is missing."""
    device = Device.detect()
    if ds.get("fp16", {}).get("enabled") is True and not device.fp16:
        return r"^fp16.enabled = true: this cpu has no float16 arithmetic"
    if ds.get("optimizer", {}).get("type") == "FusedAdam" and not device.apex:
        return r"^optimizer.type = 'FusedAdam': needs a GPU and NVIDIA Apex"
    return ""


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    ds = json.loads(file.read_text())
    return ds, NO_CLIP if ds["zero_optimization"]["stage"] == 0 else {}


def train(files: list[Path]) -> dict[str, list[float]]:
    """Losses and first gradient norm, here and in plain fp32, by file."""
    world = start(read_launch())
    result = {}
    for file in files:
        ds, training = read(file)
        run = small_run(training=training)
        trajectory, _ = run_engine(run, ds, world)
        reference = run_plain(run)
        result[file.stem] = [
            max(abs(a / b - 1) for a, b in zip(trajectory.losses, reference.losses, strict=True)),
            abs(trajectory.norms[0] / reference.norms[0] - 1),
        ]
    return result


@pytest.fixture(scope="module")
def trained() -> list[dict[str, list[float]]]:
    return run_ranks(train, 2, [file for file in FILES if not needs(read(file)[0])])


@pytest.mark.distributed
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_trains_or_is_refused(trained: list[dict[str, list[float]]], file: Path) -> None:
    ds, training = read(file)
    if reason := needs(ds):
        with pytest.raises(ConfigError, match=reason):
            resolve_ds_config(small_run(training=training), ds, 2, Device.detect())
        return
    exact = "fp32" in file.stem
    for rank in trained:
        loss, norm = rank[file.stem]
        assert math.isfinite(loss)
        assert loss < (1e-5 if exact else 0.02)
        assert norm < (1e-5 if exact else 0.1)
