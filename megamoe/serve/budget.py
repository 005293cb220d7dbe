"""How much memory experts may take: bytes, or a share of all of them. No torch."""

import re
from dataclasses import dataclass

from megamoe.errors import ConfigError

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]iB|B|%)?")


@dataclass(frozen=True)
class Budget:
    """Memory for experts.

    Attributes:
        amount: bytes, or a share of all experts.
        is_share: which of the two.
        text: as it was written.
    """

    amount: float
    is_share: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From ``64MiB``, ``1GiB`` or ``25%``.

        Raises:
            ConfigError: it is neither.
        """
        match = _WRITTEN.fullmatch(text)
        if match is None or match[2] is None or float(match[1]) <= 0:
            raise ConfigError(f"budget = {text!r}: give bytes, as 64MiB, or a share of all experts, as 25%")
        number, unit = float(match[1]), match[2]
        if unit == "%":
            return cls(number / 100, True, text)
        return cls(number * _UNITS[unit], False, text)

    def bytes_of(self, all_bytes: int) -> float:
        """Bytes, where all experts have `all_bytes`."""
        return self.amount * all_bytes if self.is_share else self.amount

    def __str__(self) -> str:
        return self.text
