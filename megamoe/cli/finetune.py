"""``megamoe finetune``."""

import argparse

from megamoe.cli.train import add_deepspeed_arguments, add_local_rank, add_profile, read_launch_arguments
from megamoe.config.recipes import RECIPES
from megamoe.training import signals

SUMMARY = "fine-tune a language model into a sentence classifier, or go on with that"
EXAMPLES = """\
  megamoe finetune --task sst2 --checkpoint runs/first/best
  megamoe finetune --task sst2 --checkpoint runs/first/best --data data/SST-2 name=glue
  megamoe finetune --task sst2 --checkpoint runs/first/best --recipe reference name=published
  megamoe finetune --task banking77 --checkpoint runs/first/best --data data/banking77 optimizer.lr=1e-3
  torchrun --nproc_per_node 2 --module megamoe finetune --task imdb --checkpoint runs/first --data aclImdb

Without --data the bundled film review sentences are read; docs/finetuning.md shows the forms of the others.
The run folder is OUTPUT_DIR/NAME (runs/TASK-ROUTER where no name is given); the same command goes on
from its newest checkpoint, and `megamoe evaluate RUN` scores it again. --profile is that of megamoe train.
`megamoe config --reference` lists all options."""
TASKS = ("sst2", "sst5", "imdb", "banking77")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = f"{parser.prog} --task TASK --checkpoint DIR [options] [section.option=value ...]"
    parser.add_argument("--task", required=True, choices=TASKS, help="form of the labelled text (task.name)")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="language model: best/, step-*/ or a run folder (task.checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="", metavar="DIR",
        help="folder of the labelled text (task.path); default: the bundled sentences, for sst2",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES), default="transfer",
        help="defaults of the run: transfer (the default), or reference, the published script",
    )  # fmt: skip
    parser.add_argument(
        "--from_scratch", "--from-scratch", action="store_true",
        help="random weights in place of the checkpoint's, as a control (task.from_scratch)",
    )  # fmt: skip
    parser.add_argument("--config", default="", metavar="FILE", help="TOML or JSON, laid over the recipe")
    add_deepspeed_arguments(parser)
    add_local_rank(parser)
    add_profile(parser)
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Fine-tune."""
    signals.listen()
    overrides = [*args.overrides, f"task.name={args.task}"]
    if args.data:
        overrides.append(f"task.path={args.data}")
    if args.from_scratch:
        overrides.append("task.from_scratch=true")
    ds, launch = read_launch_arguments(args)

    from megamoe.training.finetune import configure_finetuning, finetune

    config = configure_finetuning(args.checkpoint, args.recipe, args.config, overrides)
    if args.profile:
        from megamoe.training.profile.trainer import profile_finetuning

        profile_finetuning(config, ds, launch)
    else:
        finetune(config, ds, launch)
    signals.ignore()
    return 0
