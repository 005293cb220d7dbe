"""``megamoe plan``."""

import argparse
import json
from pathlib import Path

from megamoe.cli.train import add_config_arguments, add_deepspeed_arguments, read_deepspeed_config, read_run
from megamoe.errors import ConfigError

SUMMARY = "foresee memory, traffic and time of a run on a cluster, and the layouts that suit it"
EXAMPLES = """\
  megamoe plan --preset xl_enwik8 --nodes 16 --gpus-per-node 8 --device h100
  megamoe plan --preset xxl_enwik8 --nodes 64 --device h200 moe.ep_size=64 --plot a.png
  megamoe plan --preset tiny_enwik8 --gpus-per-node 2 --device cpu --json
  megamoe plan --preset xl_enwik8 --nodes 8 --device a100 --scaling 1,2,4,8,16,32

The arguments are those of megamoe train; nothing is started and nothing of the model's size allocated. Exit
code 2: the configs are refused, or the layout does not fit and the last line says what would. docs/scaling.md
tells how the figures are made; they are a model, not a measurement."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    add_deepspeed_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", "--gpus_per_node", type=int, default=8, metavar="N",
        help="devices of a node, one rank on each (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="h100", metavar="NAME",
        help="a100, h100, h200, b200, mi300x, or cpu: this one, measured (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=float, metavar="X",
        help="share of the device's peak that matrix products reach (default: 0.5 on GPUs, 0.8 on CPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--scaling", default="", metavar="N,N,...",
        help="show the best layout on each of these numbers of nodes, the batch growing with them or not",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the memory of a rank as a PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Foresee and print."""
    config = read_run(args)
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        raise ConfigError(f"--efficiency = {args.efficiency}: give a share of the peak, above 0 and up to 1")
    if args.plot and not args.plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot = {str(args.plot)!r}: there is no such folder; make it first")
    nodes = _numbers(args.scaling)
    ds = read_deepspeed_config(args)

    from megamoe.plan.devices import Cluster, accelerator
    from megamoe.plan.layouts import plan, require_fit
    from megamoe.plan.plot import plot_memory
    from megamoe.plan.report import as_json, reasons, scaling_json, scaling_table, tables
    from megamoe.plan.scaling import scaling
    from megamoe.training.terminal import open_terminal

    device = accelerator(args.device, args.gpus_per_node)
    cluster, terminal = Cluster(args.nodes, args.gpus_per_node, device), open_terminal()
    if nodes:
        rows = scaling(config, ds, cluster, nodes, args.efficiency)
        if args.json:
            print(json.dumps(scaling_json(rows), indent=2))
        else:
            terminal.print(scaling_table(rows))
        return 0
    made = plan(config, ds, cluster, args.efficiency)
    if args.json:
        print(json.dumps(as_json(made), indent=2))
    else:
        for table in tables(made):
            terminal.print(table, highlight=False)
        for line in reasons(made):
            terminal.print(line, highlight=False, soft_wrap=True, markup=False)
    if args.plot:
        plot_memory(made, args.plot)
    require_fit(made)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",") if word]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ConfigError(f"--scaling = {text!r}: give numbers of nodes, as 1,2,4")
    return numbers
