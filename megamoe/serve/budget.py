"""How much memory experts may take: bytes, or a share of all of them. No torch."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megamoe.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B|%)")


@dataclass(frozen=True)
class Budget:
    """Memory for experts.

    Attributes:
        amount: bytes, or a share of all experts.
        is_share: which of the two.
        text: as it was written.
    """

    amount: Fraction
    is_share: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From ``64MiB``, ``1GiB`` or ``25%``.

        Raises:
            ConfigError: it is neither.
        """
        match = _WRITTEN.fullmatch(text)
        if match is None or not Fraction(match[1]):
            raise ConfigError(f"budget = {text!r}: give bytes, as 64MiB, or a share of all experts, as 25%")
        number, unit = Fraction(match[1]), match[2]
        if unit == "%":
            return cls(number / 100, True, text)
        return cls(number * _UNITS[unit], False, text)

    def bytes_of(self, all_bytes: int) -> Fraction:
        """Bytes, where all experts have `all_bytes`."""
        return self.amount * all_bytes if self.is_share else self.amount

    def __str__(self) -> str:
        return self.text
