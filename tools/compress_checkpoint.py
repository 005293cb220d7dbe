"""Write a checkpoint whose experts take fewer bytes, and tell what that saves and costs.

resmoe  the barycenter of a layer's experts, hidden units in the best order, and pruned or low-rank residuals
svd     truncated singular value decomposition of every expert
prune   the largest entries of every expert
merge   experts merged into groups by use and by what the router makes of them (M-SMoE)
drop    the most useful experts alone; the result is a smaller neutral checkpoint

`megamoe evaluate OUT` and megamoe.load_model read the result, convert_checkpoint.py from-compressed makes it
neutral again. Nothing existing is overwritten. docs/compressing.md tells more.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamoe.compress.settings import METHODS, RANKED_BY, RESIDUALS, Settings
from megamoe.errors import ConfigError, MegaMoEError

KEEPS = (0.1, 0.25, 0.5, 0.75)
MAX_TOKENS = 65536
# Options that only one method knows.
OF_METHOD = {"residual": "resmoe", "starts": "resmoe", "by": "drop"}

EXAMPLES = """\
examples:
  compress_checkpoint.py runs/demo/best small --method resmoe
  compress_checkpoint.py runs/demo/best small --method resmoe --residual svd --keep 0.5 --score
  compress_checkpoint.py runs/demo/best fewer --method drop --keep 0.5 --by frequency --json
  compress_checkpoint.py runs/demo/best --curve curve.png --keep 0.1,0.25,0.5 --set data.path=data/enwik8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code is 0, 2 for a user's mistake, 130 on Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = _parser().parse_intermixed_args(arguments)  # OUT may come last
    try:
        if args.curve:
            _curve(args)
        else:
            _compress(args)
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="neutral checkpoint with experts, or a run folder")
    parser.add_argument(
        "output", type=Path, metavar="OUT", nargs="?", help="folder to make; not with --curve"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=METHODS, help="see above")
    what.add_argument(
        "--curve", type=Path, metavar="PNG", help="instead draw every method's figures against its bytes"
    )
    parser.add_argument(
        "--keep",
        type=_fractions,
        metavar="S",
        help="fraction in (0, 1] of each residual or expert, or of the experts, to keep (default:"
        f" {Settings.keep}); with --curve several (default: {','.join(map(str, KEEPS))})",
    )
    parser.add_argument(
        "--residual",
        choices=RESIDUALS,
        help=f"of resmoe, what becomes of residuals (default: {Settings.residual})",
    )
    parser.add_argument(
        "--starts",
        type=int,
        metavar="N",
        help=f"of resmoe, starts of the search for the barycenter (default: {Settings.starts})",
    )
    parser.add_argument(
        "--by",
        choices=RANKED_BY,
        help="of drop, an expert's worth: its weight times the norm of its output, summed over tokens, or how"
        f" often it is chosen (default: {Settings.by})",
    )
    parser.add_argument(
        "--score", action="store_true", help="score before and after at every k, on valid text"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="read about so many tokens of the valid text, to score and to see which experts are used; 0"
        " reads all (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="data.* and evaluation.* where the text is elsewhere, or to be read otherwise, than in the run",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a fraction such as 0.25") from None


def _compress(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megamoe.compress.methods import compress
    from megamoe.compress.report import report
    from megamoe.compress.source import Source

    if args.output is None:
        raise ConfigError("OUT: missing; name the folder to make")
    keep = args.keep or (Settings.keep,)
    if len(keep) > 1:
        raise ConfigError(f"--keep = {','.join(map(str, keep))}: several are for --curve; give one")
    settings = Settings(method=args.method, keep=keep[0], **_own_options(args))
    source = Source(args.input, args.set, args.max_tokens)
    losses = compress(source, settings, args.output)
    found = report(source, settings, args.output, losses, args.score)
    if args.json:
        print(json.dumps(found.to_dict()))
        return
    console = Console()
    for table in found.tables():
        console.print(table)


def _own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the method that were given.

    Raises:
        ConfigError: one belongs to another method.
    """
    given = {name: getattr(args, name) for name in OF_METHOD if getattr(args, name) is not None}
    for name in given:
        if OF_METHOD[name] != args.method:
            raise ConfigError(f"--{name}: is for --method {OF_METHOD[name]}; leave it out")
    return given


def _curve(args: argparse.Namespace) -> None:
    from megamoe.compress.curve import measure_curve, plot_curve
    from megamoe.compress.source import Source

    _own_options(args)
    if args.output is not None or args.score:
        raise ConfigError(
            f"--curve = {str(args.curve)!r}: scores anyway and keeps no checkpoint; leave OUT out"
        )
    found = measure_curve(Source(args.input, args.set, args.max_tokens), args.keep or KEEPS)
    plot_curve(found, args.curve)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{args.curve}: {found['metric']} at k = {found['top_k']}, {found['figure']:.4f} before")
    for point in found["points"]:
        name, n_bytes = point["method"], point["bytes"]["experts"]
        print(f"  {name:15} {point['keep']:5g} {n_bytes:12,} {point['figure']:8.4f}")
    for name, reason in found["left_out"].items():
        print(f"  {name}: left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
