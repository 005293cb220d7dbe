"""Keys and values of a layer's latest positions, kept while text is read token by token.

Memory holds hidden states, and whoever attends to it projects them again, all of them for each token. Their
projections do not change, so here these are kept instead, in a ring of C places that never moves: a new
position takes the place of the oldest. To a query at place n, the key at place c is at distance (n - c)
mod C: the distances C - 1, ..., 0, turned around by as much as the ring is. Written twice in a row, they
hold every such turn as a slice.

Shapes besides the common ones: A attention heads, W width of one head, C places, P = C + 1 distances.
"""

import torch


class KeyValueCache:
    """The ring of one layer.

    Args:
        keys_ABCW: keys of the latest C positions, the oldest first; overwritten.
        values_ABCW: their values; overwritten.
        r_APW: projected encodings of the distances C, C - 1, ..., 0.
    """

    def __init__(self, keys_ABCW: torch.Tensor, values_ABCW: torch.Tensor, r_APW: torch.Tensor) -> None:
        self.keys_ABCW, self.values_ABCW = keys_ABCW, values_ABCW
        self.n_places = keys_ABCW.shape[2]
        self._turns = torch.cat([r_APW, r_APW[:, 1:-1]], dim=1)
        self._newest = self.n_places - 1

    def append(
        self, key_AB1W: torch.Tensor, value_AB1W: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put one position in the place of the oldest.

        Returns:
            keys and values [A, B, C, W] in the order of their places, and projected distances [A, P, W] of
            which all but the first belong to the places. They change with the next call.
        """
        self._newest = (self._newest + 1) % self.n_places
        self.keys_ABCW[:, :, self._newest] = key_AB1W[:, :, 0]
        self.values_ABCW[:, :, self._newest] = value_AB1W[:, :, 0]
        start = self.n_places - 1 - self._newest
        return self.keys_ABCW, self.values_ABCW, self._turns[:, start : start + self.n_places + 1]
