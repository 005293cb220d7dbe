"""Which neurons and experts of a model specialise in which functions, and when in training they came to it.

Predictivity of neurons, functional experts, how steady both are from checkpoint to checkpoint, what the
router knows, and what is lost where they are disturbed; everything beside its value by chance.
docs/modularity.md has the equations.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megamoe.analyze.settings import Settings
from megamoe.analyze.texts import BUNDLED, read_own
from megamoe.errors import CheckpointError, DataError, MegaMoEError

EXAMPLES = """\
examples:
  analyze_modularity.py runs/demo --output modularity --untrained
  analyze_modularity.py runs/demo/best --output routed --mode routed --k 4 --functions wikitext
  analyze_modularity.py step-1/ step-2/ step-3/ --output mine --labels topics.tsv --functions

keep checkpoints of a whole training with checkpoint.every=250 checkpoint.keep_every=250

exit codes: 0 done, 2 nothing was written, 130 Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(arguments)
    try:
        return _run(args, shlex.join(["tools/analyze_modularity.py", *arguments]))
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN",
        help="run folders, of which all step-* are taken; checkpoints; exported models; all of one model",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--untrained", action="store_true", help="begin with the model before its first step")
    parser.add_argument(
        "--functions", nargs="*", choices=BUNDLED, default=list(BUNDLED), metavar="GROUP",
        help=f"bundled groups of functions: {', '.join(BUNDLED)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--labels", nargs="+", type=Path, default=[], metavar="FILE",
        help="groups of one's own: files with a class, a tab and a text on each line",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("dense", "routed"), default=Settings.mode,
        help="dense: every expert is asked about every token; routed: 0 where a token is not sent"
        " (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--k", type=int, metavar="K", help="experts per token (default: moe.top_k)")
    for name, kind, what in (
        ("window", int, "tokens of a sample"),
        ("samples", int, "samples of each class, where the text suffices"),
        ("top-share", float, "share of a layer's neurons that count as a function's own"),
        ("alpha", float, "level of the test for functional experts"),
        ("shuffles", int, "shuffled labellings behind what is called chance"),
        ("partitions", int, "random partitions of the neurons into experts"),
        ("draws", int, "random experts and neurons to disturb; 0 disturbs nothing"),
        ("seed", int, "seed of all draws"),
    ):
        attribute = name.replace("-", "_")
        parser.add_argument(
            *dict.fromkeys((f"--{name}", f"--{attribute}")), type=kind, metavar="N",
            default=getattr(Settings, attribute), help=f"{what} (default: %(default)s)",
        )  # fmt: skip
    return parser


def _run(args: argparse.Namespace, command: str) -> int:
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if args.output.exists():
        raise CheckpointError(f"--output = {str(args.output)!r}: exists; remove it or choose another name")
    texts = [BUNDLED[name]() for name in args.functions] + [read_own(path) for path in args.labels]
    if not texts:
        raise DataError("--functions: none is named; name one, or give files with --labels")

    # Only now torch, so that refusals come at once.
    from megamoe.analyze.analysis import analyze
    from megamoe.analyze.output import write_analysis
    from megamoe.analyze.series import open_series

    series = open_series(args.paths, untrained=args.untrained)
    found = analyze(series, texts, settings, _tell)
    write_analysis(args.output, found, command)
    print(f"{args.output}/modularity.md, modularity.json and images")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
