"""Telling that another rank is gone from all other errors."""

import torch.distributed as dist

from megamoe.errors import LostRankError

_BY_TYPE = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
# Gloo raises plain RuntimeErrors, which begin with the place in its sources.
_GLOO_TRANSPORT = "gloo/transport/"
_GLOO_TEXTS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
    "Application timeout caused pair closure",
)  # fmt: skip


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective or the store failed because another process does not answer."""
    if isinstance(error, _BY_TYPE):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and _GLOO_TRANSPORT in text
        and any(part in text for part in _GLOO_TEXTS)
    )


def lost_rank(error: BaseException, rank: int, where: str) -> LostRankError:
    """`error` as what it means, in one line."""
    reason = str(error).splitlines()[0].partition("This is typically")[0].strip()
    return LostRankError(f"rank {rank} lost another rank {where} ({reason})")
