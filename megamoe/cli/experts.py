"""The option --expert-budget, which several subcommands have."""

import argparse

from megamoe.serve.budget import Budget


def add_expert_budget(parser: argparse._ActionsContainer) -> None:
    """Declare it."""
    parser.add_argument(
        "--expert-budget", "--expert_budget", metavar="SIZE",
        help="memory for experts, as 64MiB or 25%%; the others are loaded as they are needed (default: all)",
    )  # fmt: skip


def read_expert_budget(args: argparse.Namespace) -> Budget | None:
    """What was asked for; None for all experts.

    Raises:
        ConfigError: it is no size.
    """
    return None if args.expert_budget is None else Budget.parse(args.expert_budget)
