"""``megamoe presets``."""

import argparse

from megamoe.config.presets import PRESETS

SUMMARY = "list the ready-made runs"
EXAMPLES = """\
  megamoe presets
  megamoe config --preset tiny_enwik8"""


def configure(parser: argparse.ArgumentParser) -> None:
    """There are no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print a line for each."""
    width = max(map(len, PRESETS))
    for name, preset in PRESETS.items():
        print(f"{name:<{width}}  {preset.summary}")
    return 0
