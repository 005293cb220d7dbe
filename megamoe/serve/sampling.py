"""From scores of the vocabulary to the next token.

With logits l, temperature t and probabilities p = softmax(l / t) in falling order, the nucleus is
p_1, ..., p_n with the smallest n whose sum reaches `top_p` (Holtzman et al., "The Curious Case of Neural
Text Degeneration", ICLR 2020, arXiv 1904.09751). A uniform number u draws the first token whose cumulated
probability is above u * (p_1 + ... + p_n).

Shapes: B rows, V vocabulary, in falling order of probability.
"""

from collections.abc import Iterable

import torch

from megamoe.moe.initialization import generator
from megamoe.serve.settings import Settings


class Sampler:
    """Draws tokens of B rows, each from random numbers of its own.

    Args:
        settings: temperature, `top_p` and seed.
        rows: of each row its prompt and the number of its sample, which with the seed decide its draws: they
            do not depend on the other rows.
        device: where the scores are.
    """

    def __init__(
        self, settings: Settings, rows: Iterable[tuple[bytes, int]], device: torch.device | str = "cpu"
    ) -> None:
        self.settings, self.device = settings, device
        self._draws = [generator(settings.seed, "text", prompt.hex(), sample) for prompt, sample in rows]

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [B]."""
        if self.settings.temperature == 0:
            return logits_BV.argmax(-1)
        uniform_B = torch.stack(
            [torch.rand((), dtype=torch.double, generator=draws) for draws in self._draws]
        )
        return draw(logits_BV, uniform_B.to(self.device), self.settings.temperature, self.settings.top_p)


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token [B] of each row's nucleus, as the head of this file defines it, in float64.

    Args:
        logits_BV: scores.
        uniform_B: u, in [0, 1).
        temperature: above 0.
        top_p: above 0, at most 1.
    """
    logits_BV = logits_BV.double()
    # The largest is 0, so that no temperature makes it infinite.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    p_BV, ids_BV = scaled_BV.softmax(-1).sort(descending=True, stable=True)
    sums_BV = p_BV.cumsum(-1)
    last_B1 = (sums_BV - p_BV < top_p).sum(-1, keepdim=True) - 1
    point_B1 = uniform_B[:, None] * sums_BV.gather(1, last_B1)
    place_B1 = torch.searchsorted(sums_BV, point_B1, right=True).minimum(last_B1)
    return ids_BV.gather(1, place_B1)[:, 0]
