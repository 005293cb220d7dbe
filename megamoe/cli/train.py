"""``megamoe train``."""

import argparse
import os

from megamoe.config import load_config
from megamoe.config.load import named, read_file
from megamoe.training import signals

SUMMARY = "train a model, or go on with a run"
EXAMPLES = """\
  megamoe train --preset tiny_enwik8 name=first
  megamoe train --preset tiny_enwik8 moe.router.name=smoe training.max_steps=1000
  deepspeed --num_gpus 2 --module megamoe train --preset small_enwik8 data.path=data/enwik8 \\
      --deepspeed_config ds_configs/zero1_bf16.json
  torchrun --nproc_per_node 2 --module megamoe train --config my_run.toml

The run folder is OUTPUT_DIR/NAME (runs/PRESET-ROUTER where no name is given). The same command goes
on from its newest checkpoint. On USR1 or TERM the run saves, and ends with exit code 75: the same command
goes on as if nothing had been. `megamoe config --reference` lists all options."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    add_local_rank(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a run config comes from; later sources win."""
    parser.usage = f"{parser.prog} [options] [section.option=value ...]"
    parser.add_argument("--preset", default="", metavar="NAME", help="start from it; see megamoe presets")
    parser.add_argument("--config", default="", metavar="FILE", help="TOML or JSON, laid over the preset")
    parser.set_defaults(takes_overrides=True)


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the DeepSpeed config comes from."""
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", metavar="FILE",
        help="DeepSpeed config (JSON); default: ZeRO stage 1, bf16 where the device has it",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed", action="store_true", help="accepted for habit: training always runs under DeepSpeed"
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Declare the argument by which launchers tell a process its place on the node."""
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, metavar="N",
        help="set by launchers that do not export LOCAL_RANK",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train."""
    signals.listen()
    config = named(load_config(preset=args.preset, file=args.config, overrides=args.overrides), args.preset)
    ds = read_file(args.deepspeed_config) if args.deepspeed_config else None
    if hasattr(args, "local_rank"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))

    from megamoe.parallel.ds_config import DEFAULT_DS_CONFIG
    from megamoe.parallel.launch import read_launch
    from megamoe.training.session import train

    train(config, DEFAULT_DS_CONFIG if ds is None else ds, read_launch())
    signals.ignore()
    return 0
