"""Dropout whose masks do not depend on how tokens are spread over ranks and micro-batches."""

import torch
from torch import nn

from megamoe import kernels
from megamoe.moe.randomness import at_site, draw

LANES = 4
"""Each 64-bit word decides on four units by 16 bits each."""

LEVELS = 1 << 16

WORDS_AT_ONCE = {"cpu": 1 << 16}
"""Mixing runs over its words many times: on a CPU they should stay in the cache of a core."""
MOST_WORDS_AT_ONCE = 1 << 24


def dropped_levels(p: float) -> int:
    """How many of 65536 equally likely numbers drop a unit: p in between 0 and 1 drops some, not all."""
    return min(max(round(p * LEVELS), 1), LEVELS - 1) if p else 0


def keep_mask(keys: torch.Tensor, width: int, p: float) -> torch.Tensor:
    """bool [..., width] for keys [...]: False with probability `dropped_levels(p)` / 65536, independently."""
    if kernels.take(keys):
        keep_NU = torch.ops.megamoe.keep_mask(keys.contiguous(), width, dropped_levels(p))
        return keep_NU.view(*keys.shape, width)
    n_words = -(-width // LANES)
    words_W = torch.arange(n_words, device=keys.device)
    keys_N1 = keys.reshape(-1, 1)
    keep_NU = torch.empty(len(keys_N1), LANES * n_words, dtype=torch.bool, device=keys.device)
    at_once = max(1, WORDS_AT_ONCE.get(keys.device.type, MOST_WORDS_AT_ONCE) // max(1, n_words))
    for block_N1, keep in zip(keys_N1.split(at_once), keep_NU.split(at_once), strict=True):
        lanes = draw(block_N1, words_W).view(torch.int16)
        torch.ge(lanes, dropped_levels(p) - LEVELS // 2, out=keep)
    return keep_NU[:, :width].reshape(*keys.shape, width)


def rescale(p: float) -> float:
    """What kept units are multiplied by, so that their mean stays."""
    return LEVELS / (LEVELS - dropped_levels(p))


def drop_(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """Drop units of `x` in place, outside autograd, all but those to `keep`, a `keep_mask`."""
    # CPUs multiply by bytes in half the time that they need for booleans.
    return x.mul_(keep.view(torch.uint8)).mul_(rescale(p))


class Dropout(nn.Module):
    """In training, zero units with probability p and multiply the others by 1 / (1 - p).

    Which units is a function of their token's key, the site and the place of the unit. p is rounded to
    a multiple of 1 / 65536.

    Args:
        p: probability in [0, 1); 0 costs nothing.
        site: name of this place in the model; places of different names draw independently.
    """

    def __init__(self, p: float, site: str) -> None:
        super().__init__()
        self.p = p
        self.site = site

    @property
    def active(self) -> bool:
        """Whether anything is dropped, so that keys are needed."""
        return self.training and self.p > 0

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Drop units of `x` [..., width].

        Args:
            keys: int64 [...], of the tokens as `randomness.token_keys` gives them; may be None when not
                active.
        """
        if not self.active:
            return x
        assert keys is not None, f"dropout at {self.site} in training: give the keys of the tokens"
        keep = keep_mask(at_site(keys, self.site), x.shape[-1], self.p)
        return (x * keep.view(torch.uint8)).mul_(rescale(self.p))

    def extra_repr(self) -> str:
        """Probability and site, for print(model)."""
        return f"p={self.p}, site={self.site!r}"
