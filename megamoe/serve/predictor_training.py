"""A predictor learns the routings that were recorded.

With p the softmax of a router's T = min(30, E) largest scores and q that of the predictor's scores of the
same experts, the loss of a token in a layer is

    sum_e p_e log(p_e / q_e) + lambda CE(first choice),    lambda = 0.005

(truncated knowledge distillation; the paper's code takes the sum of |p_e - q_e| instead).

Paper: Du et al., MLSys 2024, arXiv 2310.18859, section 3.3.

Shapes besides the common ones: L mixture layers, T teacher's scores.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from megamoe.serve.predictor import Predictor
from megamoe.serve.recall import (
    Embed,
    frequent_experts,
    guesses_of,
    mean_recall,
    previous_experts,
    recalls,
)
from megamoe.serve.recording import RecordedSegment, RoutingRecords, split

FIRST_CHOICE_WEIGHT = 0.005
HELD_OUT = 0.1
LEARNING_RATE = 1e-3
PATIENCE = 2
"""Epochs without a better recall after which it ends."""


@dataclass(frozen=True)
class Fit:
    """What training came to, on the segments that were held out.

    Attributes:
        top_k: experts per token.
        recalls: of each layer, recall by m.
        frequent: the same of the experts that were chosen most often, at m = k.
        previous: the same of the experts of the token before, at m = k.
        epochs: passes over the text.
        tokens: tokens behind each figure.
    """

    top_k: int
    recalls: list[dict[int, float]]
    frequent: list[dict[int, float]]
    previous: list[dict[int, float]]
    epochs: int
    tokens: int


def train_predictor(
    predictor: Predictor,
    embed: Embed,
    records: RoutingRecords,
    *,
    epochs: int,
    after_epoch: Callable[[int, float, float], None] = lambda epoch, loss, recall: None,
) -> Fit:
    """Train until recall on the last tenth of the segments no longer rises; the best weights stay.

    Args:
        predictor: to be trained.
        embed: the served model's embedding.
        records: routings.
        epochs: most passes over the text.
        after_epoch: told the epoch, its loss, and recall at m = k.

    Raises:
        DataError: a record is damaged, or there are too few.
    """
    train, held_out = split(records.n_segments, HELD_OUT)
    top_k = records.segment(0).expert_ids_BSK[0].shape[-1]
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE)
    best, weights, epoch, since_best = -1.0, copy.deepcopy(predictor.state_dict()), 0, 0
    while epoch < epochs and since_best < PATIENCE:
        epoch += 1
        loss = _train_epoch(predictor, embed, records, train, optimizer)
        recall = mean_recall(recalls(guesses_of(predictor, embed), records, held_out, [top_k]), top_k)
        after_epoch(epoch, loss, recall)
        since_best += 1
        if recall > best:
            best, weights, since_best = recall, copy.deepcopy(predictor.state_dict()), 0
    predictor.load_state_dict(weights)
    ms = sorted({m for m in (1, 2, 3, top_k, 2 * top_k) if m <= records.n_experts})
    return Fit(
        top_k=top_k,
        recalls=recalls(guesses_of(predictor, embed), records, held_out, ms),
        frequent=recalls(frequent_experts(records, train), records, held_out, [top_k]),
        previous=recalls(previous_experts(records.n_experts), records, held_out, [top_k]),
        epochs=epoch,
        tokens=sum(records.segment(number).token_ids_BS.numel() for number in held_out),
    )


def distillation_loss(logits_BSLE: torch.Tensor, segment: RecordedSegment) -> torch.Tensor:
    """The loss at the head of this file, its mean over tokens and layers."""
    losses = []
    parts = zip(segment.expert_ids_BSK, segment.top_ids_BST, segment.top_logits_BST, strict=True)
    for layer, (ids_BSK, top_ids_BST, top_logits_BST) in enumerate(parts):
        logits_BSE = logits_BSLE[:, :, layer]
        log_p_BST = top_logits_BST.float().log_softmax(-1)
        log_q_BST = logits_BSE.gather(-1, top_ids_BST.long()).log_softmax(-1)
        divergence = functional.kl_div(log_q_BST, log_p_BST, reduction="sum", log_target=True)
        first_T = ids_BSK[..., 0].flatten().long()
        choice = functional.cross_entropy(logits_BSE.flatten(0, 1), first_T, ignore_index=-1, reduction="sum")
        losses.append((divergence + FIRST_CHOICE_WEIGHT * choice) / len(first_T))
    return torch.stack(losses).mean()


def _train_epoch(
    predictor: Predictor,
    embed: Embed,
    records: RoutingRecords,
    numbers: Sequence[int],
    optimizer: torch.optim.Optimizer,
) -> float:
    """The mean loss of one pass, in which gradients end where segments do."""
    predictor.train()
    state, total = None, 0.0
    for segment in map(records.segment, numbers):
        if segment.resets_B.any():
            state = None
        with torch.no_grad():
            x_BSD = embed(segment.token_ids_BS.long())
        logits_BSLE, state = predictor(x_BSD, state)
        loss = distillation_loss(logits_BSLE, segment)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    return total / len(numbers)
