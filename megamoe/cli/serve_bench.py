"""``megamoe serve-bench``."""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path

from megamoe.errors import ConfigError
from megamoe.serve.budget import Budget

SUMMARY = "measure serving with few experts in memory against all in memory"
EXAMPLES = """\
  megamoe serve-bench runs/first/best
  megamoe serve-bench runs/first/best --predictor runs/first/predictor --budget 25% --budget 64MiB
  megamoe serve-bench runs/first/best --at-once 64 --tokens 4000 --output serving

The text is the held-out one of the run; data.* options change it. Every row is measured in a process of
its own. See docs/serving.md for what the modes are."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best/, step-*/, a run folder or an export")
    parser.add_argument(
        "--budget", action="append", metavar="SIZE",
        help="memory for experts, as 64MiB or 25%%; may be repeated (default: 25%% and 50%%)",
    )  # fmt: skip
    parser.add_argument("--predictor", type=Path, metavar="DIR", help="what megamoe predict-experts wrote")
    parser.add_argument("--k", type=int, metavar="K", help="experts per token (default: moe.top_k)")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="text to read (default: 2000)")
    parser.add_argument(
        "--at-once", "--at_once", type=int, default=1, metavar="N",
        help="tokens read at once; 1 as while text is generated (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--policy",
        choices=("fifo", "lru", "lfu"),
        default="lru",
        help="which expert makes room (default: lru)",
    )
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="default: test")
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json, NAME.md and NAME.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    budgets = tuple(map(Budget.parse, args.budget or ("25%", "50%")))
    if args.output and not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output = {str(args.output)!r}: there is no such folder; make it first")

    from megamoe.serve.serving_bench import BenchSettings, bench_serving
    from megamoe.serve.serving_report import plot, report

    settings = BenchSettings(
        budgets=budgets, n_tokens=args.tokens, at_once=args.at_once, policy=args.policy,
        predictor=args.predictor, k=args.k, split=args.split,
    )  # fmt: skip
    result = {"command": shlex.join(["megamoe", *sys.argv[1:]]), "date": date.today().isoformat()}
    result |= bench_serving(args.checkpoint, settings, args.overrides)
    print(json.dumps(result, indent=2) if args.json else report(result))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(f"# Serving\n\n{report(result)}", encoding="utf-8")
        plot(result, args.output.with_suffix(".png"))
    return 0
