"""What n-gram statistics alone know of a text: the baselines that a trained model has to beat.

The order of a model is the number of tokens it looks back at.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.data.tokenizers import Ids
from megamoe.errors import DataError

Codes = npt.NDArray[np.int64]


def conditional_entropy(tokens: Ids, vocab_size: int, order: int) -> float:
    """H(x_t | x_{t-order}, ..., x_{t-1}) in bits per token under the counts of `tokens` itself.

    No model of that order can predict these very tokens better on average, and none that has not seen
    them will do as well: with rising order the counts learn the text by heart.

    Raises:
        DataError: the text is shorter than order + 1, or order is too high for 63 bits.
    """
    if len(tokens) <= order:
        raise DataError(f"order = {order}: needs more than the {len(tokens)} tokens of the text")
    seen = _Continuations.count(tokens, vocab_size, order)
    p = seen.pair_counts / np.repeat(seen.context_counts, seen.distinct)
    return float(-(seen.pair_counts * np.log2(p)).sum() / seen.pair_counts.sum())


def cross_entropy(train: Ids, test: Ids, vocab_size: int, order: int) -> float:
    """Mean -log2 p(x_t | x_{t-order}, ..., x_{t-1}) over `test`, in bits per token, with p from `train`.

    Witten-Bell smoothing (Witten and Bell 1991) interpolates every order with the one below it, down to
    the uniform distribution over the vocabulary:

        p_k(x | h) = (c(hx) + d(h) p_{k-1}(x | h')) / (c(h) + d(h))

    with c(h) occurrences of the context h, d(h) distinct tokens after it, and h' the context without
    its earliest token. The first tokens of `test` have shorter contexts.

    Raises:
        DataError: a text is too short, or order is too high for 63 bits.
    """
    if not len(test) or len(train) <= order:
        raise DataError(f"order = {order}: needs a test text, and more than {order} tokens of training text")
    p = np.full(len(test), 1 / vocab_size)
    for k in range(min(order + 1, len(test))):
        seen = _Continuations.count(train, vocab_size, k)
        n_pair, n_context, n_distinct = seen.look_up(_codes(test, vocab_size, k), vocab_size)
        smoothed = (n_pair + n_distinct * p[k:]) / np.maximum(n_context + n_distinct, 1)
        p[k:] = np.where(n_context > 0, smoothed, p[k:])
    return float(-np.log2(p).mean())


@dataclass(frozen=True)
class _Continuations:
    """Counts of (context, next token) pairs and of contexts, both as sorted codes."""

    pairs: Codes
    pair_counts: Codes
    contexts: Codes
    context_counts: Codes
    distinct: Codes

    @classmethod
    def count(cls, tokens: Ids, vocab_size: int, order: int) -> "_Continuations":
        pairs, pair_counts = np.unique(_codes(tokens, vocab_size, order), return_counts=True)
        contexts, first, distinct = np.unique(pairs // vocab_size, return_index=True, return_counts=True)
        return cls(pairs, pair_counts, contexts, np.add.reduceat(pair_counts, first), distinct)

    def look_up(self, codes: Codes, vocab_size: int) -> tuple[Codes, Codes, Codes]:
        """Of each pair in `codes`: its count, and its context's count and distinct continuations."""
        at = _find(self.contexts, codes // vocab_size)
        n_context = np.where(at < 0, 0, self.context_counts[at])
        n_distinct = np.where(at < 0, 0, self.distinct[at])
        at = _find(self.pairs, codes)
        return np.where(at < 0, 0, self.pair_counts[at]), n_context, n_distinct


def _find(known: Codes, wanted: Codes) -> Codes:
    """Where each of `wanted` stands in the sorted `known`; -1 where it does not."""
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


def _codes(tokens: Ids, vocab_size: int, order: int) -> Codes:
    """A number for each token from index `order` on that stands for its `order` predecessors and itself."""
    if vocab_size ** (order + 1) >= 1 << 63:
        raise DataError(f"order = {order}: is too high for a vocabulary of {vocab_size}")
    codes = np.zeros(len(tokens) - order, np.int64)
    for i in range(order + 1):
        codes = codes * vocab_size + tokens[i : len(tokens) - order + i]
    return codes
