"""Show what is in a checkpoint, check that it is sound, or tell how two of them differ.

Neutral checkpoints, exported models, DeepSpeed's native MoE files and published model.pt are all read, and
nothing in them is run. Only headers are read unless norms, a check or a difference is asked for.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.errors import MegaMoEError

if TYPE_CHECKING:
    from megamoe.convert.differences import Difference
    from megamoe.convert.listing import Row
    from megamoe.convert.opening import Opened

EXAMPLES = """\
examples:
  inspect_checkpoint.py runs/demo                  newest checkpoint of a run
  inspect_checkpoint.py runs/demo/best --norms --depth 3
  inspect_checkpoint.py runs/demo/best --verify
  inspect_checkpoint.py --diff runs/demo/best exported

exit codes: 0 sound or equal, 1 problems were found or the two differ, 2 it cannot be read, 130 Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = _parser()
    args = parser.parse_args(arguments)
    chosen = "--diff" if args.diff else "--verify" if args.verify else ""
    for option in ("verify", "norms", "depth"):
        if chosen not in ("", f"--{option}") and getattr(args, option) not in (None, False):
            parser.error(f"argument --{option}: not with {chosen}, which reads everything anyway")
    try:
        if args.diff:
            first, second = args.diff
            return _diff(first, second, args.json)
        return _verify(args.path, args.json) if args.verify else _show(args)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MegaMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("path", type=Path, nargs="?", metavar="PATH", help="a checkpoint, or a run folder")
    what.add_argument("--diff", type=Path, nargs=2, metavar=("A", "B"), help="tell which tensors differ")
    parser.add_argument("--norms", action="store_true", help="show the L2 norm of every tensor")
    parser.add_argument("--depth", type=int, metavar="N", help="show N levels of paths (default: all)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything: hashes, every expert once, no two alike, finite, as the config says",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _open(path: Path) -> "Opened":
    from megamoe.convert.opening import open_any

    return open_any(path)


def _show(args: argparse.Namespace) -> int:
    from megamoe.convert.listing import norm_of, tree

    opened = _open(args.path)
    rows = tree(opened.tensors, norm_of if args.norms else None)
    shown = [row for row in rows if args.depth is None or row.depth < args.depth]
    if args.json:
        return _print_json(opened, rows=list(map(asdict, shown)))
    print(f"{opened.path}: {opened.kind}, {_size(sum(tensor.n_bytes for tensor in opened.tensors))}")
    width = max((2 * row.depth + len(row.label) for row in shown), default=0)
    for row in shown:
        print(_line(row, width))
    return 0


def _line(row: "Row", width: int) -> str:
    label = "  " * row.depth + row.label
    line = f"{label:{width}}  {_size(row.n_bytes):>9}"
    if row.shape is not None:
        line += f"  {row.dtype:8}  {list(row.shape)}"
    return line if row.norm is None else f"{line}  norm {row.norm:.6g}"


def _verify(path: Path, as_json: bool) -> int:
    from megamoe.convert.soundness import problems

    opened = _open(path)
    found = list(problems(opened))
    if as_json:
        _print_json(opened, problems=found)
    else:
        for problem in found:
            print(f"problem: {problem}")
        if not found:
            print(f"{opened.path}: {opened.kind}, {len(opened.tensors)} tensors: sound; {_unchecked(opened)}")
    return 1 if found else 0


def _unchecked(opened: "Opened") -> str:
    """What its kind leaves unsaid."""
    missing = [] if opened.verify_files else ["hashes"]
    missing += [] if opened.config else ["a config"]
    return f"its files hold no {' and no '.join(missing)} to check" if missing else "hashes and config agree"


def _diff(a: Path, b: Path, as_json: bool) -> int:
    from megamoe.convert.differences import differences

    first, second = _open(a), _open(b)
    found = list(differences(first.tensors, second.tensors))
    if as_json:
        _dump({"a": str(first.path), "b": str(second.path), "differences": list(map(asdict, found))})
    else:
        print(f"A: {first.path}: {first.kind}\nB: {second.path}: {second.kind}")
        for difference in found:
            print(f"  {_difference(difference)}")
        both = {(t.kind, t.name) for t in first.tensors} & {(t.kind, t.name) for t in second.tensors}
        differing = {(difference.kind, difference.name) for difference in found}
        print(f"{len(both - differing)} tensors are equal bit for bit, {len(found)} differ")
    return 1 if found else 0


def _difference(found: "Difference") -> str:
    line = f"{found.kind} {found.name}: {found.what}"
    if found.what == "values":
        line += f" by up to {found.largest:.6g}"
        line += "" if found.relative is None else f", relative {found.relative:.3g}"
    return line + (f" ({found.detail})" if found.detail else "")


def _print_json(opened: "Opened", **more: Any) -> int:
    _dump({"path": str(opened.path), "kind": opened.kind} | more)
    return 0


def _dump(values: dict[str, Any]) -> None:
    """Print as JSON, which has no word for numbers that are not finite."""
    print(json.dumps(_finite(values), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(n_bytes: int) -> str:
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
