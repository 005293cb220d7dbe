"""``megamoe compare``."""

import argparse
import shlex
import sys
from dataclasses import replace

from megamoe.cli.train import add_config_arguments
from megamoe.config import load_config
from megamoe.errors import ConfigError

SUMMARY = "train routing policies on equal terms, several seeds each, and report"
EXAMPLES = """\
  megamoe compare --preset tiny_enwik8 --routers hyper,smoe_dropout,smoe --seeds 3
  megamoe compare --preset tiny_enwik8 --routers switch,sigma,compete:rate=0.1 --budget flops --jobs 2
  megamoe compare --preset small_enwik8 --routers hyper,smoe --seeds 2 --ranks 2 data.path=data/enwik8

All runs have the same data in the same order, model, optimizer and schedule. The folder is OUTPUT_DIR/NAME
(runs/compare_PRESET where no name is given) with a run folder ROUTER-seedN for each, as
slurm/compare_routers.sh makes them, and compare.json, compare.md, figures.png and routing.png. The same
command goes on where it was cut; runs that are finished are left alone. Options follow a policy's name
(compete:rate=0.1, stratified:strata=4+12); those of the preset or file hold for the policy that it names."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--routers",
        required=True,
        metavar="A,B,...",
        help="policies, each NAME or NAME:option=value:...; + separates a list's numbers",
    )
    for name, default, what in (
        ("--seeds", 3, "runs of each policy"),
        ("--jobs", 1, "runs at a time"),
        ("--ranks", 1, "processes of a run"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--budget", choices=("tokens", "flops", "parameters"), default="tokens",
        help="what is equal: tokens; FLOPs in experts, where a policy that computes fewer trains longer; or"
        " trained parameters, by the width of experts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", default="", metavar="FILE",
        help="DeepSpeed config (JSON) of every run; default: that of megamoe train",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compare."""
    for name in ("seeds", "jobs", "ranks"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} = {getattr(args, name)}: give a number above 0")
    base = load_config(preset=args.preset, file=args.config, overrides=args.overrides)
    if any(override.startswith("moe.router.") for override in args.overrides):
        raise ConfigError("moe.router: is what --routers compares; write options there, as NAME:option=value")
    base = base if base.name else replace(base, name=f"compare_{args.preset or 'run'}")

    from megamoe.compare.comparison import compare

    command = shlex.join(["megamoe", *sys.argv[1:]])
    compare(
        base, args.routers.split(","), n_seeds=args.seeds, budget=args.budget, jobs=args.jobs,
        ranks=args.ranks, ds_config=args.deepspeed_config, command=command,
    )  # fmt: skip
    return 0
