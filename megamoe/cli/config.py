"""``megamoe config``."""

import argparse
import json

from megamoe.cli.train import add_config_arguments
from megamoe.config import load_config
from megamoe.config.reference import markdown

SUMMARY = "print a resolved run config, or the reference of all options"
EXAMPLES = """\
  megamoe config --preset large_enwik8
  megamoe config --preset tiny_enwik8 moe.top_k=2 > my_run.json
  megamoe config --reference"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument("--reference", action="store_true", help="all options with defaults, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Print."""
    if args.reference:
        print(markdown(), end="")
        return 0
    config = load_config(preset=args.preset, file=args.config, overrides=args.overrides)
    print(json.dumps(config.to_dict(), indent=2))
    return 0
