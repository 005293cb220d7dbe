"""What a compression is asked for. Needs no torch, so that help and refusals come at once."""

from dataclasses import dataclass

from megamoe.errors import ConfigError

METHODS = ("resmoe", "svd", "prune", "merge", "drop")
RESIDUALS = ("prune", "svd")
"""How resmoe codes residuals."""
RANKED_BY = ("contribution", "frequency")
"""What drop keeps experts for: the sum of weight times norm of the output, or how often they are chosen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        method: one of `METHODS`.
        keep: fraction in (0, 1] of the numbers of each residual or expert, or of the experts.
        residual: of resmoe, one of `RESIDUALS`.
        starts: of resmoe, starts of the search for the barycenter.
        by: of drop, one of `RANKED_BY`.

    Raises:
        ConfigError: a number is out of its range.
    """

    method: str
    keep: float = 0.25
    residual: str = RESIDUALS[0]
    starts: int = 4
    by: str = RANKED_BY[0]

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"--keep = {self.keep}: give a fraction above 0, at most 1")
        if self.starts < 1:
            raise ConfigError(f"--starts = {self.starts}: give 1 or more")

    @property
    def name(self) -> str:
        """The method, with its residual where it has one."""
        return f"{self.method} ({self.residual})" if self.method == "resmoe" else self.method
