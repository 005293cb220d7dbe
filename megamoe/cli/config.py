"""``megamoe config``."""

import argparse
import json

from megamoe.cli.train import add_config_arguments, add_deepspeed_arguments
from megamoe.config import load_config
from megamoe.config.load import named, read_file
from megamoe.config.reference import markdown
from megamoe.training.run_folder import RunFolder

SUMMARY = "print a resolved run config, its run folder, or the reference of all options"
EXAMPLES = """\
  megamoe config --preset large_enwik8
  megamoe config --preset tiny_enwik8 moe.top_k=2 > my_run.json
  megamoe config --preset large_enwik8 moe.router.name=smoe --run-folder
  megamoe config --reference

The arguments are those of megamoe train; mistakes in them are refused here as they are there."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    parser.add_argument("--run-folder", action="store_true", help="print where megamoe train would run it")
    parser.add_argument("--reference", action="store_true", help="all options with defaults, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Print."""
    if args.reference:
        print(markdown(), end="")
        return 0
    config = load_config(preset=args.preset, file=args.config, overrides=args.overrides)
    if args.deepspeed_config:
        read_file(args.deepspeed_config)
    if args.run_folder:
        print(RunFolder.of(named(config, args.preset)).root)
        return 0
    print(json.dumps(config.to_dict(), indent=2))
    return 0
