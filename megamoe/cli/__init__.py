"""One module per subcommand: read arguments, call, print. No logic.

A subcommand is a module with ``SUMMARY`` and ``EXAMPLES`` for ``--help``, ``configure(parser)`` and
``run(args) -> int``, the exit code. None imports torch before it runs, so that help and refusals come
at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from megamoe import __version__
from megamoe.cli import config, env, evaluate, finetune, presets, routers, train
from megamoe.errors import ConfigError, MegaMoEError

COMMANDS = {
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "config": config,
    "presets": presets,
    "routers": routers,
    "env": env,
}
USER_ERROR, INTERRUPTED = 2, 130
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
GRACE_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for a user's mistake, 130 on Ctrl-C."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        return args.run(args)
    except MegaMoEError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`megamoe config | head`); Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="megamoe", allow_abbrev=False,
        description="Train and score sparse mixture-of-experts language models on DeepSpeed.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts it before the subcommand.
    train.add_local_rank(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.SUMMARY, description=f"{module.SUMMARY}.", allow_abbrev=False,
            epilog=f"examples:\n{module.EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=module.run, takes_overrides=False)
        module.configure(command)
    # Overrides may stand between options, which argparse cannot say of a list of positionals.
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not args.takes_overrides]
    if unknown:
        parser.error(f"{unknown[0]!r}: unknown argument")
    args.overrides = rest
    return args


def _refuse(error: MegaMoEError) -> int:
    """Rank 0 tells, in one line. The others wait for the launcher to end them, so as not to be first."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    if rank == "0":
        print("megamoe: error:", " ".join(str(error).split()), file=sys.stderr)
    else:
        time.sleep(GRACE_SECONDS)
    return USER_ERROR
