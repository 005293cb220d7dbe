"""``megamoe env``."""

import argparse
import json

SUMMARY = "print versions, devices and launch variables, as environment.json holds them"
EXAMPLES = """\
  megamoe env"""


def configure(parser: argparse.ArgumentParser) -> None:
    """There are no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print JSON."""
    from megamoe.training.environment import describe_environment

    print(json.dumps(describe_environment(), indent=2))
    return 0
