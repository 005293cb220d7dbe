"""Figures for people, in powers of 1000."""

from rich.filesize import decimal


def size(n_bytes: float) -> str:
    """As "1.2 GB"."""
    return decimal(int(n_bytes))


def speed(bytes_per_second: float) -> str:
    """As "1.2 GB/s"."""
    return f"{size(bytes_per_second)}/s"


def flop_rate(per_second: float) -> str:
    """As "1.2 TFLOP/s"."""
    return f"{per_second / 1e12:,.1f} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:,.0f} GFLOP/s"


def operations(count: float) -> str:
    """As "1.23 TFLOP", down to MFLOP."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def numbers(count: float) -> str:
    """As "1.23 B", in billions, millions and thousands."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"


def seconds(value: float) -> str:
    """As "1.23 s" or "45.6 ms"."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
