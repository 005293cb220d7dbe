"""Turn checkpoints into other checkpoints: from and to other programs, other sizes, other precisions."""

import argparse
import importlib
import signal
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

from megamoe.errors import MegaMoEError

# Each is the module megamoe.convert.NAME, dashes being underscores; docs/converting.md describes them.
COMMANDS: dict[str, str] = {
    "from-reference": "published HyperRouter or SMoE-Dropout model.pt and optimizer.pt to neutral",
    "from-transformer-xl": "dense Transformer-XL model or state dict to neutral",
    "to-reference": "neutral to a state dict and Adam state that the published program loads",
    "export": "neutral to safetensors, config.json, tokenizer and model card",
    "cast": "weights of an exported model to another precision",
    "average": "mean of the weights of several checkpoints",
    "upcycle": "dense to experts: copies, or shards of copies",
    "split": "dense to experts: each gets a share of the hidden units",
    "merge": "experts to dense",
    "from-deepspeed": "files of engine.save_checkpoint with native MoE layers to neutral",
    "from-compressed": "compressed experts to dense ones",
    "to-deepspeed": "neutral to files that engine.load_checkpoint reads into native MoE layers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code is 0, 2 for a user's mistake, 130 on Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Only the chosen command is imported, so that --help needs no torch.
    command = load(arguments[0]) if arguments and arguments[0] in COMMANDS else None
    args = _parser(arguments[0] if command else "", command).parse_args(arguments)
    try:
        return args.run(args)
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def load(name: str) -> ModuleType:
    """The module of a command: SUMMARY, EXAMPLES, configure(parser) and run(args) -> exit code."""
    return importlib.import_module(f"megamoe.convert.{name.replace('-', '_')}")


def _parser(chosen: str, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="convert_checkpoint.py COMMAND --help tells more. Nothing existing is ever overwritten.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if module and name == chosen:
            summary = module.SUMMARY
            command.description = summary if "\n" in summary else textwrap.fill(summary, 100)
            command.epilog = f"examples:\n{module.EXAMPLES}"
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
