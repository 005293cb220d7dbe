"""Preparing a corpus by one process and by several: seconds of the whole command, in turn, round by round.

The text is the training split of WikiText-2, bundled with megamoe, end to end until it is --megabytes
long. Wall time counts, so other work on the machine blurs it: the report tells the load average, and the
range of the rounds beside the median. Every folder is compared with that of one process.

    python -m benchmarks.preparation --output benchmarks/results/2026-11-26-preparation
"""

import argparse
import filecmp
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.record import add_output, keep
from megamoe.data.samples import bundled_text

TOOL = Path(__file__).parents[1] / "tools" / "prepare_data.py"
TOKENIZERS = ("bytes", "words", "sentencepiece")


def write_text(path: Path, megabytes: int) -> None:
    """The bundled text again and again, in whole copies."""
    content = b"".join(
        block for source in bundled_text("wikitext2").splits["train"] for block in source.blocks()
    )
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(content)


def seconds_of(text: Path, tokenizer: str, n_ranks: int, output: Path) -> float:
    """One run of the tool under `mpirun`, or of one process without it."""
    launcher = ["mpirun", "--oversubscribe", "-n", str(n_ranks)] if n_ranks > 1 else []
    command = [*launcher, sys.executable, str(TOOL), "text", str(text), "--tokenizer", tokenizer]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    start = time.perf_counter()
    subprocess.run(
        [*command, "--output", str(output)], env=os.environ | root, check=True, capture_output=True
    )
    return time.perf_counter() - start


def require_equal(folder: Path, other: Path) -> None:
    """Check that two prepared folders hold the same files, byte for byte."""
    names = sorted(path.name for path in folder.iterdir())
    _, different, missing = filecmp.cmpfiles(folder, other, names, shallow=False)
    if different or missing or names != sorted(path.name for path in other.iterdir()):
        raise SystemExit(f"{folder} and {other} differ in {[*different, *missing]}")


def compare(megabytes: int, n_ranks: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round by tokenizer and number of ranks."""
    times: dict[str, dict[int, list[float]]] = {name: {1: [], n_ranks: []} for name in TOKENIZERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text", megabytes)
        for _ in range(rounds):
            for tokenizer, by_ranks in times.items():
                for n, seconds in by_ranks.items():
                    seconds.append(seconds_of(folder / "text", tokenizer, n, folder / f"by-{n}"))
                require_equal(folder / "by-1", folder / f"by-{n_ranks}")
                for n in by_ranks:
                    shutil.rmtree(folder / f"by-{n}")
        n_bytes = (folder / "text").stat().st_size
    seconds_by_ranks = {
        tokenizer: {str(n): seconds for n, seconds in by_ranks.items()}
        for tokenizer, by_ranks in times.items()
    }
    return {"bytes": n_bytes, "ranks": n_ranks, "rounds": rounds, "seconds": seconds_by_ranks}


def summary(seconds: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def report(result: dict[str, Any]) -> str:
    """A table of Markdown with the machine and the command."""
    n = str(result["ranks"])
    lines = [
        f"# Preparing {result['bytes'] / 1e6:.0f} MB of text, {result['date']}",
        "",
        f"`{result['command']}` on {result['machine']}; {result['rounds']} rounds, in turn:",
        "median (least to most). All folders were equal. Load average"
        f" {result['load'][0]:.1f} before and {result['load'][1]:.1f} after.",
        "",
        f"| tokenizer | 1 process, s | {n} ranks, s | ratio |",
        "|---|---:|---:|---:|",
    ]
    for tokenizer, seconds in result["seconds"].items():
        alone, shared = seconds["1"], seconds[n]
        ratio = statistics.median(alone) / statistics.median(shared)
        lines.append(f"| {tokenizer} | {summary(alone)} | {summary(shared)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compare, print the table, and keep it with the figures under --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=50, help="length of the text (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of mpirun (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    add_output(parser)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    result = compare(args.megabytes, args.ranks, args.rounds)
    result |= {
        "load": [load, os.getloadavg()[0]],
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.preparation", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
