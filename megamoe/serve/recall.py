"""How well the experts of tokens are guessed, by a predictor and in two ways that need none.

Recall at m is the share of a token's executed experts that are among the m best guesses.

Shapes besides the common ones: L mixture layers.
"""

from collections.abc import Callable, Sequence

import torch

from megamoe.serve.predictor import Predictor
from megamoe.serve.recording import RecordedSegment, RoutingRecords

Embed = Callable[[torch.Tensor], torch.Tensor]
Guess = Callable[[RecordedSegment], torch.Tensor]
"""From a segment to scores [B, S, L, E]; segments come in order."""


def guesses_of(predictor: Predictor, embed: Embed) -> Guess:
    """Those of a predictor that reads from the first segment it is asked about."""
    predictor.eval()
    state = None

    @torch.no_grad()
    def guess(segment: RecordedSegment) -> torch.Tensor:
        nonlocal state
        logits_BSLE, state = predictor(embed(segment.token_ids_BS.long()), state)
        return logits_BSLE

    return guess


def previous_experts(n_experts: int) -> Guess:
    """Those of the token before; before the first one there are none."""
    last_B1LE: torch.Tensor | None = None

    def guess(segment: RecordedSegment) -> torch.Tensor:
        nonlocal last_B1LE
        chosen_BSLE = chosen(segment, n_experts)
        before_B1LE = torch.zeros_like(chosen_BSLE[:, :1]) if last_B1LE is None else last_B1LE
        last_B1LE = chosen_BSLE[:, -1:]
        return torch.cat([before_B1LE, chosen_BSLE[:, :-1]], dim=1)

    return guess


def frequent_experts(records: RoutingRecords, numbers: Sequence[int]) -> Guess:
    """The same for every token: how often each expert was chosen in the segments `numbers`."""
    counts_LE = torch.zeros(len(records.layers), records.n_experts)
    for segment in map(records.segment, numbers):
        counts_LE += chosen(segment, records.n_experts).sum((0, 1))
    return lambda segment: counts_LE.expand(*segment.token_ids_BS.shape, *counts_LE.shape)


def recalls(
    guess: Guess, records: RoutingRecords, numbers: Sequence[int], ms: Sequence[int]
) -> list[dict[int, float]]:
    """Recall of each layer by m."""
    found = {m: torch.zeros(len(records.layers)) for m in ms}
    wanted_L = torch.zeros(len(records.layers))
    for segment in map(records.segment, numbers):
        scores_BSLE, chosen_BSLE = guess(segment), chosen(segment, records.n_experts)
        wanted_L += chosen_BSLE.sum((0, 1, 3))
        for m in ms:
            ids_BSLm = scores_BSLE.topk(m).indices
            found[m] += chosen_BSLE.gather(-1, ids_BSLm).sum((0, 1, 3))
    return [{m: float(found[m][layer] / wanted_L[layer]) for m in ms} for layer in range(len(records.layers))]


def chosen(segment: RecordedSegment, n_experts: int) -> torch.Tensor:
    """1 where an expert was executed, [B, S, L, E]."""
    ids_BSLK = torch.stack(segment.expert_ids_BSK, dim=2).long() + 1
    none_BSLE = torch.zeros(*ids_BSLK.shape[:-1], n_experts + 1)
    return none_BSLE.scatter_(-1, ids_BSLK, 1.0)[..., 1:]


def mean_recall(recalls: Sequence[dict[int, float]], m: int) -> float:
    """Recall at m, its mean over layers."""
    return sum(of_layer[m] for of_layer in recalls) / len(recalls)
