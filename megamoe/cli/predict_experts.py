"""``megamoe predict-experts``."""

import argparse
import sys
from pathlib import Path

from megamoe.errors import ConfigError

SUMMARY = "train a predictor of routings, by which experts are loaded ahead"
EXAMPLES = """\
  megamoe predict-experts runs/first/best runs/first/predictor
  megamoe predict-experts runs/first/best runs/first/predictor --tokens 1000000 --width 128
  megamoe generate runs/first/best --prompt "The " --expert-budget 25% --predictor runs/first/predictor

Reads training text of the run (data.* options change it), records how it is routed, and learns that.
Writes predictor.safetensors, predictor.json and routings/."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best/, step-*/, a run folder or an export")
    parser.add_argument("output", type=Path, metavar="DIR", help="where to write; must not exist")
    parser.add_argument("--k", type=int, metavar="K", help="experts per token (default: moe.top_k)")
    for name, default, what in (
        ("tokens", 400_000, "training text to record"),
        ("epochs", 20, "most passes over it; it ends before if recall no longer rises"),
        ("width", 256, "hidden width of the predictor"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Train and print."""
    for name in ("tokens", "epochs", "width"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} = {getattr(args, name)}: give a number above 0")

    from rich.console import Console

    from megamoe.serve.learning import learn_predictor
    from megamoe.serve.recall_table import recall_table

    def tell(epoch: int, loss: float, recall: float) -> None:
        print(f"epoch {epoch}/{args.epochs} | loss {loss:.4f} | recall {100 * recall:.2f} %", file=sys.stderr)

    fit = learn_predictor(
        args.checkpoint, args.output, n_tokens=args.tokens, epochs=args.epochs, width=args.width, k=args.k,
        overrides=args.overrides, after_epoch=tell,
    )  # fmt: skip
    Console().print(recall_table(fit))
    return 0
