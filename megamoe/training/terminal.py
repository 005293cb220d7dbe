"""How wide what is printed may be."""

from rich.console import Console

LOG_WIDTH = 120
"""Columns of logs and pipes, which need not fit into the 80 of a terminal."""


def open_terminal() -> Console:
    """Standard output: as wide as the terminal, or `LOG_WIDTH` where it is none."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=LOG_WIDTH)
