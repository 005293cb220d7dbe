"""``megamoe preflight``."""

import argparse

from megamoe.cli.train import (
    add_config_arguments,
    add_deepspeed_arguments,
    add_local_rank,
    read_launch_arguments,
    read_run,
)

SUMMARY = "measure the allocated nodes, and judge whether a run can start on them"
EXAMPLES = """\
  sbatch --nodes=2 slurm/preflight.sh large_enwik8
  srun megamoe preflight --preset large_enwik8 --deepspeed_config ds_configs/zero1_bf16.json
  torchrun --nproc_per_node 2 --module megamoe preflight --preset tiny_enwik8 --json

The arguments are those of the run that is to start. Exit code 0: all well, or warnings only; 1: a problem
would stop the run or falsify it; 76: a rank does not answer, it is named."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S",
        help="seconds that ranks may need to meet, and for any one measurement (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-skew", type=float, default=0.5, metavar="S",
        help="seconds by which clocks of nodes may differ without a warning (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_local_rank(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and judge."""
    config = read_run(args)
    ds, launch = read_launch_arguments(args)

    from megamoe.training.preflight.check import preflight

    return preflight(
        config, ds, launch, timeout=args.timeout, max_skew=args.max_skew, as_json=args.json
    )  # fmt: skip
