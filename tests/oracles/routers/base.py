import math
from functools import cache

import torch

from tests.oracles.routers import Decided, Given, largest, linear_logits


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    ids = [largest(row, 1) for row in logits]
    if given.training:
        for sequence in set(given.sequence):
            members = [t for t, s in enumerate(given.sequence) if s == sequence]
            best = best_assignment([logits[t].tolist() for t in members])
            for t, e in zip(members, best, strict=True):
                ids[t] = [e]
    weights = [[1 / (1 + torch.exp(-row[e]))] for row, (e,) in zip(logits, ids, strict=True)]
    return Decided(given.mix(ids, weights), ids)


def best_assignment(scores: list[list[float]]) -> list[int]:
    """By trying all, token after token, over the room that is left."""
    n_experts = len(scores[0])

    @cache
    def best(t: int, room: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        if t == len(scores):
            return 0.0, ()
        options = []
        for e in range(n_experts):
            if room[e]:
                rest, chosen = best(t + 1, (*room[:e], room[e] - 1, *room[e + 1 :]))
                options.append((scores[t][e] + rest, (e, *chosen)))
        return max(options)

    return list(best(0, (math.ceil(len(scores) / n_experts),) * n_experts)[1])
