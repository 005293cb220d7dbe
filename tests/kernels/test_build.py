"""How the compiled kernels are built, and what happens where they cannot be."""

import subprocess
import sys
from pathlib import Path

from megamoe.training.metrics_file import read_metrics
from tests.environment import environment

USE = "from megamoe import kernels; kernels.use(compiled=True); print(kernels.in_use())"
TRAIN = (
    "megamoe", "train", "--preset", "tiny_enwik8", "training.max_steps=3",
    "training.batch_size=4", "evaluation.max_tokens=256", "evaluation.top_ks=2", "logging.every=1",
)  # fmt: skip


def start(*command: str, **changes: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command], env=environment() | changes, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_are_built_once_by_however_many_start_at_once(tmp_path: Path) -> None:
    place = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    first = [start("-c", USE, **place) for _ in range(2)]
    for process in first:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and output.split()[-1] == "True", output
    (library,) = tmp_path.rglob("*.so")
    built = library.stat()
    process = start("-c", USE, CXX="/nowhere/c++", **place)
    assert process.communicate(timeout=240)[0].split()[-1] == "True"
    assert list(tmp_path.rglob("*.so")) == [library] and library.stat().st_mtime_ns == built.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == [library.parent.name]


def test_a_damaged_library_is_named_with_the_remedy(tmp_path: Path) -> None:
    place = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    name = "from megamoe.kernels import build; print(f'{build.NAME}-{build._digest()}')"
    folder = tmp_path / start("-c", name).communicate(timeout=240)[0].split()[-1]
    folder.mkdir()
    (folder / "megamoe_kernels.so").write_bytes(b"no library")
    output, _ = start("-c", USE, **place).communicate(timeout=240)
    assert "ConfigError: training.kernels = 'compiled': cannot be loaded (" in output
    assert f"; remove {folder}, or set training.kernels=torch" in output


def losses(tmp_path: Path, name: str, *more: str, **changes: str) -> tuple[list[float], str]:
    arguments = (*TRAIN, f"output_dir={tmp_path}", f"name={name}", *more)
    process = start("-m", *arguments, **changes)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    lines = read_metrics(tmp_path / name / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line], output


def test_a_run_trains_with_them_or_goes_on_without_a_compiler(tmp_path: Path) -> None:
    expected, _ = losses(tmp_path, "torch")
    found, output = losses(tmp_path, "compiled", "training.kernels=compiled")
    assert "compiled kernels" in output
    assert len(found) == 3 and all(abs(a - b) < 1e-4 for a, b in zip(found, expected, strict=True))
    nowhere = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "/nowhere/c++"}
    found, output = losses(tmp_path, "without", "training.kernels=compiled", **nowhere)
    assert "training.kernels = 'compiled': cannot be built" in output and "goes on with torch" in output
    assert "compiled kernels" not in output and "Traceback" not in output
    assert found == expected
