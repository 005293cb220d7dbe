"""``megamoe routers``."""

import argparse
import inspect
import sys
from dataclasses import fields

SUMMARY = "list the routing policies, or show the equations and options of one"
EXAMPLES = """\
  megamoe routers
  megamoe routers hyper"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a policy; without it, all are listed")


def run(args: argparse.Namespace) -> int:
    """Print."""
    if args.name:
        _show(args.name)
    else:
        _list()
    return 0


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from megamoe.moe.routers import available, router_class

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "policy", "causal", "paper"):
        table.add_column(title)
    for name in available():
        policy = router_class(name)
        table.add_row(name, policy.summary, policy.causal, policy.paper)
    Console().print(table)


def _show(name: str) -> None:
    from megamoe.moe.routers import router_class

    policy = router_class(name)
    print(inspect.getdoc(sys.modules[policy.__module__]))
    options = fields(policy.Options)
    print("\noptions:" if options else "\nno options")
    for option in options:
        print(f"  moe.router.{option.name}={option.default}  {option.metadata.get('help', '')}")
