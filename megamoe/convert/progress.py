"""How far a conversion is: a bar on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""

_LINES = 4


def progress(total_bytes: int, what: str) -> Progress:
    """A callback that shows on stderr how much of `total_bytes` is done.

    Args:
        total_bytes: the sum of all calls to come.
        what: what is being done, such as "writing exported".
    """
    if sys.stderr.isatty():
        return _bar(total_bytes, what)
    print(f"{what} ({total_bytes:,} bytes)", file=sys.stderr, flush=True)
    return _lines(total_bytes, what)


def _bar(total_bytes: int, what: str) -> Progress:
    bar = tqdm(desc=what, total=total_bytes, unit="B", unit_scale=True)

    def advance(n_bytes: int) -> None:
        bar.update(n_bytes)
        if bar.n >= total_bytes:
            bar.close()

    return advance


def _lines(total_bytes: int, what: str) -> Progress:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        before, done = done, done + n_bytes
        if total_bytes and before * _LINES // total_bytes < done * _LINES // total_bytes:
            print(f"{what}: {done / total_bytes:.0%}", file=sys.stderr, flush=True)

    return advance
