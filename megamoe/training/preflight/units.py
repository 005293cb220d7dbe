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
