"""What may be asked of text that is generated. No torch, so that refusals come at once."""

import math
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import ConfigError
from megamoe.serve.budget import Budget


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts go on.

    Attributes:
        k: experts per token; None means the model's `moe.top_k`.
        max_new_tokens: tokens that each text gets.
        temperature: what logits are divided by; 0 always takes the most probable token.
        top_p: draw from the fewest tokens whose probabilities reach this sum; 1 draws from all.
        samples: texts from each prompt.
        seed: of all draws.
        expert_budget: memory for experts, of which the others stay in the checkpoint's files; None takes all
            into memory.
        predictor: folder of a predictor, by which experts are loaded ahead.

    Raises:
        ConfigError: a number is out of range, or there is a predictor and nothing to load ahead.
    """

    k: int | None = None
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    expert_budget: Budget | None = None
    predictor: Path | None = None

    def __post_init__(self) -> None:
        for name in ("k", "max_new_tokens", "samples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "give a number above 0")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature,
                 "give 0, which takes the most probable token, or a number above it")  # fmt: skip
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0, at most 1")
        _require(0 <= self.seed < 1 << 63, "seed", self.seed, "give a number from 0 to 2^63 - 1")
        _require(self.predictor is None or self.expert_budget is not None, "predictor", self.predictor,
                 "loads nothing ahead where all experts are in memory; give expert_budget too")  # fmt: skip


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value}: {remedy}")
