"""Memory that each conversion of tools/convert_checkpoint.py takes, in units of the largest layer.

Every command runs as a process of its own, once on a tiny model, which tells what the program itself holds,
and once on a large one: a mixture and a dense model of four layers, trained for one step. What the second
needs more is divided by the weights of the largest layer, of the input or of the output.

resident   peak of resident memory, file pages included
own        peak of the part of it that no file stands behind

    python -m benchmarks.conversion --output benchmarks/results/2026-11-26-conversion
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.record import add_output, keep

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"
LARGE = {"d_model": 512, "n_experts": 16, "d_expert": 1200}
TINY = {"d_model": 16, "n_experts": 16, "d_expert": 16}
COPIES = 2
"""Experts that `upcycle` makes of each network."""


@dataclass(frozen=True)
class Run:
    """What one process took: MB and seconds."""

    resident: float
    own: float
    seconds: float


def run(*command: object) -> Run:
    """Run to the end, looking at the process every few milliseconds."""
    begin, own = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        own = max(own, _own_kilobytes(process.pid))
        time.sleep(0.003)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))}: {process.stderr.read()}")
    process.stderr.close()
    return Run(usage.ru_maxrss / 1000, own / 1000, seconds)


def _own_kilobytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def train(folder: Path, name: str, sizes: dict[str, int], *, dense: bool) -> Path:
    """A checkpoint with moments, of one step."""
    d_model, hidden = sizes["d_model"], sizes["n_experts"] * sizes["d_expert"]
    moe = (
        ["moe.layers=none"]
        if dense
        else ["moe.layers=all", f"moe.n_experts={sizes['n_experts']}", f"moe.d_expert={sizes['d_expert']}"]
    )
    run(
        "-m", "megamoe", "train", "--preset", "tiny_enwik8", f"name={name}", f"output_dir={folder}",
        "model.n_layers=4", f"model.d_model={d_model}", f"model.n_heads={d_model // 16}", "model.d_head=16",
        f"model.d_inner={hidden}", "model.segment_len=16", "model.memory_len=16", *moe,
        "training.batch_size=2", "training.max_steps=1", "evaluation.every=0", "evaluation.top_ks=2",
        "evaluation.segment_len=128", "evaluation.batch_size=50", "logging.tensorboard=false",
    )  # fmt: skip
    return folder / name / "checkpoints" / "step-000000001"


def commands(folder: Path, mixture: Path, dense: Path) -> dict[str, list[object]]:
    """By name, in an order in which each finds its input; outputs are named after the command."""
    out = {name: folder / name for name in (
        "to-reference", "from-reference", "to-deepspeed", "from-deepspeed", "export", "cast", "average",
        "dense-reference", "from-transformer-xl", "upcycle", "split", "merge",
    )}  # fmt: skip
    published = out["to-reference"]
    return {
        "to-reference": [mixture, published],
        "from-reference": [
            published / "model.pt", "--optimizer", published / "optimizer.pt", out["from-reference"],
        ],
        "to-deepspeed": ["--world-size", 2, "--ep-size", 2, mixture, out["to-deepspeed"]],
        "from-deepspeed": [
            "--config", mixture / "config.json", out["to-deepspeed"], out["from-deepspeed"],
        ],
        "export": [mixture, out["export"]],
        "cast": ["--dtype", "bf16", out["export"], out["cast"]],
        "average": [mixture, mixture, out["average"]],
        "dense-reference": [dense, out["dense-reference"]],
        "from-transformer-xl": [out["dense-reference"] / "model.pt", out["from-transformer-xl"]],
        "upcycle": ["--n-experts", COPIES, "--top-k", 1, dense, out["upcycle"]],
        "split": ["--n-experts", LARGE["n_experts"], dense, out["split"]],
        "merge": [out["split"], out["merge"]],
    }  # fmt: skip


def convert(folder: Path, sizes: dict[str, int]) -> dict[str, Run]:
    """What each command took on models of `sizes`."""
    folder.mkdir()
    mixture = train(folder, "mixture", sizes, dense=False)
    dense = train(folder, "dense", sizes, dense=True)
    took = {}
    for name, words in commands(folder, mixture, dense).items():
        command = "to-reference" if name == "dense-reference" else name
        print(f"{command} on d_model = {sizes['d_model']}", file=sys.stderr, flush=True)
        took[name] = run(TOOL, command, *words)
    return took


def layer_megabytes(sizes: dict[str, int]) -> float:
    """fp32 weights and biases of a mixture, and of attention beside it."""
    d_model, n_experts, hidden = sizes["d_model"], sizes["n_experts"], sizes["n_experts"] * sizes["d_expert"]
    experts = 2 * d_model * hidden + hidden + n_experts * d_model
    return 4 * (experts + 5 * d_model * d_model) / 1e6


def compare() -> dict[str, Any]:
    """Figures of every command."""
    with tempfile.TemporaryDirectory() as name:
        tiny, large = (
            convert(Path(name) / size, sizes) for size, sizes in (("tiny", TINY), ("large", LARGE))
        )
    layer = layer_megabytes(LARGE)
    rows = {}
    for command, took in large.items():
        unit = layer * (COPIES if command == "upcycle" else 1)
        rows[command] = {
            "resident_layers": (took.resident - tiny[command].resident) / unit,
            "own_layers": (took.own - tiny[command].own) / unit,
            "tiny": asdict(tiny[command]),
            "large": asdict(took),
        }
    return {"layer_megabytes": layer, "commands": rows}


def report(result: dict[str, Any]) -> str:
    """A table of Markdown with the machine and the command."""
    lines = [
        f"# Memory of conversions, {result['date']}",
        "",
        f"`{result['command']}` on {result['machine']}.",
        "",
        "Peak memory beyond that of the same command on a tiny model, in units of the largest layer's"
        f" weights, {result['layer_megabytes']:.0f} MB in fp32 (for upcycle, which makes {COPIES} experts of"
        f" each network, {COPIES} times that). The models have four such layers, with Adam's moments."
        " Resident memory counts pages of mapped files, which the system takes back when it needs them; own"
        " memory does not.",
        "",
        "| command | resident | own | seconds |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {row['resident_layers']:.2f} | {row['own_layers']:.2f} | {row['large']['seconds']:.0f} |"
        for name, row in result["commands"].items()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and keep it with the figures under --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output(parser)
    args = parser.parse_args(arguments)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.conversion", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} shared CPU cores ({platform.machine()})",
    } | compare()
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
