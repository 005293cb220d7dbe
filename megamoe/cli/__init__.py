"""One module per subcommand: read arguments, call, print. No logic.

A subcommand is a module with ``SUMMARY`` and ``EXAMPLES`` for ``--help``, ``configure(parser)`` and
``run(args) -> int``, the exit code. None imports torch before it runs, so that help and refusals come
at once.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from megamoe import __version__
from megamoe.cli import (
    compare,
    config,
    env,
    evaluate,
    finetune,
    generate,
    plan,
    predict_experts,
    preflight,
    presets,
    routers,
    serve_bench,
    train,
)
from megamoe.errors import ConfigError, ExitCode, LostRankError, MegaMoEError, StoppedError
from megamoe.launchers import rank_and_size

COMMANDS = {
    "train": train,
    "compare": compare,
    "finetune": finetune,
    "plan": plan,
    "preflight": preflight,
    "evaluate": evaluate,
    "generate": generate,
    "predict-experts": predict_experts,
    "serve-bench": serve_bench,
    "config": config,
    "presets": presets,
    "routers": routers,
    "env": env,
}
GRACE_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code, see `ExitCode`."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        return args.run(args)
    except StoppedError as stop:
        if rank_and_size()[0] == 0:
            print(f"megamoe: {stop}; the same command goes on", file=sys.stderr)
        return stop.exit_code
    except MegaMoEError as error:
        return _refuse(error)
    except LostRankError as error:
        _leave_at_once(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`megamoe config | head`); Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="megamoe", allow_abbrev=False,
        description="Train, score and use sparse mixture-of-experts language models on DeepSpeed.",
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
    if rank_and_size()[0] == 0:
        print("megamoe: error:", " ".join(str(error).split()), file=sys.stderr)
    else:
        # srun reports the highest code of all ranks: let none be that of a death by SIGTERM.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(error.exit_code))
        time.sleep(GRACE_SECONDS)
    return error.exit_code


def _leave_at_once(error: LostRankError) -> NoReturn:
    """End without the usual tidying up, which would wait for the rank that is gone."""
    print("megamoe: error:", error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ExitCode.LOST_RANK)
