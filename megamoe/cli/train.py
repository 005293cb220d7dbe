"""``megamoe train``."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.config import RunConfig, load_config
from megamoe.config.load import named, read_file
from megamoe.errors import ConfigError
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
  megamoe train --preset xl_enwik8 training.batch_size=1024 --dry-run --world-size 1024 --device cuda

The run folder is OUTPUT_DIR/NAME (runs/PRESET-ROUTER where no name is given). The same command goes
on from its newest checkpoint. On USR1 or TERM the run saves, and ends with exit code 75: the same command
goes on as if nothing had been. With --profile a few steps are taken from the start, or from
checkpoint.resume=FOLDER, and a table of their time is printed; traces are in OUTPUT_DIR/NAME/profile, and
nothing else of the run is touched. With --dry-run one process checks what a start checks, for any number of
ranks and without a GPU, and shows what each of them would do; the run folder is not touched at all.
`megamoe config --reference` lists all options."""


_OF_A_DRY_RUN = ("world_size", "rank", "device", "output", "json")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    add_local_rank(parser)
    add_profile(parser)
    _add_dry_run(parser)


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


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run", "--dry_run", action="store_true",
        help="in place of training, check everything in one process and show what would happen where",
    )  # fmt: skip
    group.add_argument(
        "--world-size", "--world_size", type=int, metavar="N", help="ranks of the run; default: as launched"
    )
    group.add_argument("--rank", type=int, metavar="N", help="whose share is shown; default: 0")
    group.add_argument(
        "--device", choices=("cpu", "cuda"),
        help="what the ranks compute on, on which the automatic precision depends; default: as here",
    )  # fmt: skip
    group.add_argument("--output", metavar="DIR", help="write config.json and ds_config.json there")
    group.add_argument(
        "--json", action="store_true", default=None, help="print JSON, with the ranks of all groups"
    )


def _require_dry_run(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing, and two things to do in place of training."""
    if args.dry_run and args.profile:
        raise ConfigError("--dry-run and --profile: give one of them")
    given = [name for name in _OF_A_DRY_RUN if getattr(args, name) is not None]
    if given and not args.dry_run:
        raise ConfigError(f"--{given[0].replace('_', '-')}: belongs to --dry-run; give that too")


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
    _require_dry_run(args)
    if args.dry_run:
        return _dry_run(args)
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


def _dry_run(args: argparse.Namespace) -> int:
    """Check and show; under a launcher rank 0 does it for all."""
    config = read_run(args)
    ds, launch = read_launch_arguments(args)
    if launch.rank > 0:
        return 0

    from megamoe.parallel.device import Device
    from megamoe.training.dry_run import dry_run
    from megamoe.training.dry_run_report import show, to_json, write_configs
    from megamoe.training.terminal import open_terminal

    world_size = launch.world_size if args.world_size is None else args.world_size
    device = Device.of(args.device) if args.device else Device.detect()
    dry = dry_run(config, ds, world_size, args.rank or 0, device)
    written = write_configs(dry, Path(args.output)) if args.output else None
    if args.json:
        print(json.dumps(to_json(dry), indent=2))
    else:
        show(dry, open_terminal(), written)
    return 0
