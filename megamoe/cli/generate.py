"""``megamoe generate``."""

import argparse
import os
from pathlib import Path

from megamoe.cli.experts import add_expert_budget, read_expert_budget
from megamoe.errors import ConfigError, DataError
from megamoe.serve.settings import Settings

SUMMARY = "go on with a text, at any number of active experts"
EXAMPLES = """\
  megamoe generate runs/first/best --prompt "The history of "
  megamoe generate runs/first/best --prompt "The " --k 2 --temperature 0.8 --top-p 0.95 --max-new-tokens 500
  megamoe generate runs/first/best --prompt-file chapter.txt --samples 4 --seed 1
  megamoe generate runs/first/best --prompt "In 1905 " --prompt "In 1969 " --temperature 0 --json
  megamoe generate runs/first/best --prompt "The " --expert-budget 25% --predictor runs/first/predictor

One text is printed while it comes; several are printed one after another when they are done. A text
depends on the checkpoint, the options and its own prompt alone. Computes in fp32."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best/, step-*/, a run folder or an export")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to go on with; may be repeated"
    )
    parser.add_argument(
        "--prompt-file", "--prompt_file", action="append", default=[], metavar="FILE",
        help="the same, the content of a file; may be repeated",
    )  # fmt: skip
    parser.add_argument("--k", type=int, metavar="K", help="experts per token (default: moe.top_k)")
    for name, kind, what in (
        ("max-new-tokens", int, "tokens to add"),
        ("temperature", float, "divides logits; 0 always takes the most probable token"),
        ("top-p", float, "draw from the fewest tokens whose probabilities reach this sum"),
        ("samples", int, "texts from each prompt"),
        ("seed", int, "seed of all draws"),
    ):
        attribute = name.replace("-", "_")
        parser.add_argument(
            *dict.fromkeys((f"--{name}", f"--{attribute}")), type=kind, metavar="N",
            default=getattr(Settings, attribute), help=f"{what} (default: %(default)s)",
        )  # fmt: skip
    add_expert_budget(parser)
    parser.add_argument(
        "--predictor", type=Path, metavar="DIR", help="load them ahead by what megamoe predict-experts wrote"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each text, one a line")


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    names = ("k", "max_new_tokens", "temperature", "top_p", "samples", "seed")
    settings = Settings(
        **{name: getattr(args, name) for name in names},
        expert_budget=read_expert_budget(args), predictor=args.predictor,
    )  # fmt: skip
    prompts = [os.fsencode(prompt) for prompt in args.prompt] + [_read(file) for file in args.prompt_file]
    if not prompts:
        raise ConfigError("--prompt: none is given; give a text to go on with, or --prompt-file FILE")

    from megamoe.serve.generation import TextGenerator
    from megamoe.serve.printing import print_texts

    print_texts(TextGenerator(args.checkpoint, settings), prompts, as_json=args.json)
    return 0


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"--prompt-file = {file!r}: cannot be read ({error.strerror}); give a file") from None
