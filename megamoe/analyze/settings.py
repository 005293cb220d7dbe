"""What may be asked of an analysis of modularity. No torch, so that refusals come at once."""

from dataclasses import dataclass
from typing import Literal

from megamoe.config.schema import require_fraction, require_not_negative, require_positive
from megamoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How activations are recorded and what is tested on them.

    Attributes:
        mode: "dense" asks every expert about every token; "routed" takes 0 where a token was not sent.
        k: experts per token; None means the model's `moe.top_k`.
        window: tokens S of a sample.
        samples: samples of each class, or fewer where the text does not suffice.
        top_share: share of a layer's neurons that count as a function's own.
        alpha: level of the test for functional experts.
        shuffles: shuffled labellings behind every baseline.
        partitions: random partitions of the neurons into experts.
        draws: random experts and neurons that are disturbed for comparison; 0 disturbs nothing.
        seed: of every draw.

    Raises:
        ConfigError: a number is out of range.
    """

    mode: Literal["dense", "routed"] = "dense"
    k: int | None = None
    window: int = 128
    samples: int = 200
    top_share: float = 0.01
    alpha: float = 0.001
    shuffles: int = 100
    partitions: int = 50
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("analysis", self, "window", "samples", "shuffles", "partitions")
        require_positive("analysis", self, "top_share", "alpha")
        require_fraction("analysis", self, "top_share", "alpha")
        require_not_negative("analysis", self, "draws", "seed")
        if self.window < 2:
            raise ConfigError(f"analysis.window = {self.window}: give 2 tokens or more, to predict one")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"analysis.k = {self.k}: give a number above 0")
