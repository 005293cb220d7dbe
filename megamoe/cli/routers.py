"""``megamoe routers``."""

import argparse
import inspect
import sys
from dataclasses import fields

SUMMARY = "list the routing policies, or show the equations and options of one"
EXAMPLES = """\
  megamoe routers
  megamoe routers hyper"""


CAUSAL = {"always": "yes", "evaluation": "in evaluation", "never": "no"}


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
    table.add_column("name", no_wrap=True)
    for title in ("policy", "cost", "causal", "options", "paper"):
        table.add_column(title)
    for name in available():
        policy = router_class(name)
        options = ", ".join(option.name for option in fields(policy.Options))
        table.add_row(name, policy.summary, policy.cost, CAUSAL[policy.causal], options, policy.paper)
    console = Console()
    console.print(table)
    console.print(
        "\ncost: of experts, relative to k of them for each token; causal: choices ignore later tokens"
    )


def _show(name: str) -> None:
    from megamoe.moe.routers import router_class

    policy = router_class(name)
    print(inspect.getdoc(sys.modules[policy.__module__]))
    print(f"\ncost, what experts compute relative to routing to k of them: {policy.cost}")
    print(f"causal: {CAUSAL[policy.causal]}")
    print(f"moe.balance_loss=auto: {policy.balance_loss}")
    options = fields(policy.Options)
    print("\noptions:" if options else "\nno options")
    for option in options:
        print(f"  moe.router.{option.name}={option.default}  {option.metadata.get('help', '')}")
