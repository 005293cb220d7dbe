"""``megamoe preflight``."""

import argparse
import os
from dataclasses import replace

from megamoe.cli.train import add_config_arguments, add_local_rank
from megamoe.config import load_config
from megamoe.config.load import read_file

SUMMARY = "measure the allocated nodes, and judge whether a run can start on them"
EXAMPLES = """\
  srun megamoe preflight --preset small_enwik8 data.path=data/enwik8
  torchrun --nproc_per_node 2 --module megamoe preflight --preset tiny_enwik8 --json

Exit code 0: all well, or warnings only; 1: a finding would stop the run; 76: a rank does not answer."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", metavar="FILE", help="as for megamoe train"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for all of it (default: 120)")
    parser.add_argument(
        "--max-skew", type=float, default=0.5, help="seconds that a clock may be off (default: 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_local_rank(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and judge."""
    config = load_config(preset=args.preset, file=args.config, overrides=args.overrides)
    if not config.name:
        config = replace(config, name=f"{args.preset or 'run'}-{config.moe.router.name}")
    ds = read_file(args.deepspeed_config) if args.deepspeed_config else None
    if hasattr(args, "local_rank"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))

    from megamoe.parallel.ds_config import DEFAULT_DS_CONFIG
    from megamoe.parallel.launch import read_launch
    from megamoe.training.preflight.check import preflight

    well = preflight(
        config, DEFAULT_DS_CONFIG if ds is None else ds, read_launch(),
        timeout=args.timeout, max_skew=args.max_skew, as_json=args.json,
    )  # fmt: skip
    return 0 if well else 1
