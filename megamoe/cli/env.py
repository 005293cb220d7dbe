"""``megamoe env``."""

import argparse
import json

from megamoe.cli.train import add_config_arguments
from megamoe.config import load_config

SUMMARY = "print what a bug report needs: versions, devices, launch variables, hash of a run config"
EXAMPLES = """\
  megamoe env
  megamoe env --json > environment.json
  megamoe env --config runs/demo/config.json    # with the hash that runs/demo/environment.json holds
  srun --nodes 1 --ntasks 1 megamoe env         # of a node of the cluster"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, as environment.json holds it")


def run(args: argparse.Namespace) -> int:
    """Print."""
    config = None
    if args.preset or args.config or args.overrides:
        config = load_config(preset=args.preset, file=args.config, overrides=args.overrides).to_dict()

    from rich.console import Console

    from megamoe.training.environment import describe_environment, environment_table

    facts = describe_environment(config)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(environment_table(facts))
    return 0
