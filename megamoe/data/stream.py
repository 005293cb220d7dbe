"""Token streams as Transformer-XL reads them: every batch row is one contiguous piece of the corpus.

Shapes: B batch rows, S segment, n tokens of a row.
"""

from typing import NamedTuple

import numpy as np
import torch

from megamoe.data.domains import Domains
from megamoe.data.tokenizers import Ids
from megamoe.errors import DataError


class Batch(NamedTuple):
    """One segment of every row.

    Attributes:
        input_ids_BS: int64.
        targets_BS: int64, the token after each of the last S inputs. With extended context the inputs
            have that many more tokens in front.
        starts_epoch: True if the rows begin anew here, so that memory must be dropped before.
        domains_B2: source and target domain of each row's first token; None where the corpus has none.
    """

    input_ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    starts_epoch: bool
    domains_B2: torch.Tensor | None = None


class TokenStream:
    """A corpus split as B parallel streams, read segment by segment, over and over.

    The tokens are trimmed to a multiple of B and laid out as ``[B, n]``; segment i of an epoch is
    columns ``i*S`` to ``(i+1)*S``, with the targets one column on, and the last one may be shorter.
    A batch is a function of its step alone, so a run resumes to the token with nothing saved.

    Args:
        tokens: ids, 1-D; a memory map is read only where a batch needs it.
        batch_size: rows B over all ranks.
        segment_len: tokens per segment S.
        rows: the contiguous rows of this rank; None takes all.
        extended_context: earlier tokens that are put in front of the inputs, where there are any.
        domains: of the split.

    Attributes:
        n_segments: segments per epoch.
        n_predictions: targets per row and epoch.

    Raises:
        DataError: the rows would have no token to predict, or are not rows of this batch.
    """

    def __init__(
        self,
        tokens: Ids,
        *,
        batch_size: int,
        segment_len: int,
        rows: range | None = None,
        extended_context: int = 0,
        domains: Domains | None = None,
    ) -> None:
        row_len = len(tokens) // batch_size
        if row_len < 2:
            raise DataError(
                f"batch_size = {batch_size}: leaves no token to predict of {len(tokens):,} tokens;"
                f" stay at or below {len(tokens) // 2}"
            )
        rows = range(batch_size) if rows is None else rows
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= batch_size:
            raise DataError(f"rows = {rows}: give a contiguous part of the {batch_size} rows")
        grid = tokens[: batch_size * row_len].reshape(batch_size, row_len)
        self._rows = grid[rows.start : rows.stop]
        self._starts_B = np.arange(rows.start, rows.stop) * row_len
        self._domains = domains
        self._segment_len = segment_len
        self._extended_context = extended_context
        self.n_predictions = row_len - 1
        self.n_segments = -(-self.n_predictions // segment_len)

    def batch(self, step: int) -> Batch:
        """The segment to read at `step` (0-based), which belongs to epoch ``step // n_segments``."""
        start = step % self.n_segments * self._segment_len
        stop = min(start + self._segment_len, self.n_predictions)
        return Batch(
            self._columns(max(start - self._extended_context, 0), stop),
            self._columns(start + 1, stop + 1),
            starts_epoch=start == 0,
            domains_B2=self._domains_at(start),
        )

    def _domains_at(self, column: int) -> torch.Tensor | None:
        if self._domains is None:
            return None
        return torch.from_numpy(self._domains.at(self._starts_B + column))

    def _columns(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self._rows[:, start:stop].astype(np.int64))
