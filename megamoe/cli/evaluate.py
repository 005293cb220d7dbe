"""``megamoe evaluate``."""

import argparse
import json
from functools import partial

from megamoe.checkpoint.format import EXPERT_MODES
from megamoe.cli.experts import add_expert_budget, read_expert_budget
from megamoe.cli.train import add_local_rank

SUMMARY = "score a checkpoint on held-out text, at any number of active experts"
EXAMPLES = """\
  megamoe evaluate runs/first/best
  megamoe evaluate runs/first/best --split valid evaluation.top_ks=2,16
  megamoe evaluate runs/first/best data.path=data/enwik8 evaluation.memory_len=2048
  megamoe evaluate compressed --experts factored
  megamoe evaluate runs/first/best --expert-budget 64MiB
  torchrun --nproc_per_node 4 --module megamoe evaluate runs/first/best

  megamoe evaluate runs/sst2-hyper/best task.path=data/SST-2

Text and protocol are those of the run; data.* and evaluation.* options change them, for a classifier
task.path and evaluation.*. Computes in fp32."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = f"{parser.prog} CHECKPOINT [options] [data.option=value evaluation.option=value ...]"
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="best/, step-*/, a compressed or a run folder"
    )
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="default: test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument(
        "--experts",
        choices=EXPERT_MODES,
        default=EXPERT_MODES[0],
        help="of a compressed checkpoint: dense at once, dense while used, or never (default: %(default)s)",
    )
    add_expert_budget(how_many)
    add_local_rank(parser)
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    from rich.console import Console

    from megamoe.checkpoint.load import load_model
    from megamoe.parallel.launch import read_launch
    from megamoe.serve.offload import load_offloaded
    from megamoe.training.report import figures_table
    from megamoe.training.scoring import score

    launch, budget = read_launch(), read_expert_budget(args)
    load = partial(load_model, experts=args.experts)
    if budget is not None:
        load = partial(load_offloaded, budget=budget)
    config, evaluation = score(args.checkpoint, args.split, args.overrides, launch, load)
    if launch.rank == 0 and args.json:
        print(json.dumps(evaluation.to_dict(), indent=2))
    elif launch.rank == 0:
        Console().print(figures_table(evaluation, n_experts=config.moe.n_experts, top_k=config.moe.top_k))
    return 0
