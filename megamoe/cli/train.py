"""``megamoe train``."""

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megamoe.config import RunConfig, load_config
from megamoe.config.load import named, read_file
from megamoe.training import signals

if TYPE_CHECKING:
    from megamoe.parallel.launch import Launch

SUMMARY = "train a model, or go on with a run"
EXAMPLES = """\
  megamoe train --preset tiny_enwik8 name=first
  megamoe train --preset tiny_enwik8 moe.router.name=smoe training.max_steps=1000
  deepspeed --num_gpus 2 --module megamoe train --preset small_enwik8 data.path=data/enwik8 \\
      --deepspeed_config ds_configs/zero1_bf16.json
  torchrun --nproc_per_node 2 --module megamoe train --config my_run.toml
  mpirun -n 2 python -m megamoe train --preset tiny_enwik8
  megamoe train --preset tiny_enwik8 name=first --profile

The run folder is OUTPUT_DIR/NAME (runs/PRESET-ROUTER where no name is given). The same command goes
on from its newest checkpoint. On USR1 or TERM the run saves, and ends with exit code 75: the same command
goes on as if nothing had been. With --profile a few steps are taken from the start, or from
checkpoint.resume=FOLDER, and a table of their time is printed; traces are in OUTPUT_DIR/NAME/profile, and
nothing else of the run is touched. `megamoe config --reference` lists all options."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    add_local_rank(parser)
    add_profile(parser)


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


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that asks for a profile."""
    parser.add_argument(
        "--profile", action="store_true",
        help="in place of training, show where the time of a few steps goes (logging.profile_steps)",
    )  # fmt: skip


def read_run(args: argparse.Namespace) -> RunConfig:
    """The named config of a run that `add_config_arguments` describes."""
    return named(load_config(preset=args.preset, file=args.config, overrides=args.overrides), args.preset)


def read_deepspeed_config(args: argparse.Namespace) -> Mapping[str, Any]:
    """The DeepSpeed config that was named, or the default one."""
    if args.deepspeed_config:
        return read_file(args.deepspeed_config)

    from megamoe.parallel.ds_config import DEFAULT_DS_CONFIG

    return DEFAULT_DS_CONFIG


def read_launch_arguments(args: argparse.Namespace) -> "tuple[Mapping[str, Any], Launch]":
    """The DeepSpeed config, and who this process is."""
    if hasattr(args, "local_rank"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    ds = read_deepspeed_config(args)

    from megamoe.parallel.launch import read_launch

    return ds, read_launch()


def run(args: argparse.Namespace) -> int:
    """Train."""
    signals.listen()
    config = read_run(args)
    ds, launch = read_launch_arguments(args)

    if args.profile:
        from megamoe.training.profile.trainer import profile_training

        profile_training(config, ds, launch)
    else:
        from megamoe.training.session import train

        train(config, ds, launch)
    signals.ignore()
    return 0
