import math

import torch

from tests.oracles.routers import Decided, Given, linear_logits, softmax

CASES = [{}, {"capacity_factor": 0.5, "eval_capacity_factor": 0.6, "jitter": 0.3}, {"capacity_factor": 0}]


def route(given: Given) -> Decided:
    o, tokens = given.options, given.x_TD
    if given.training:
        u = given.spec.uniform("jitter", given.context, given.x_TD.shape[1]).double()
        given.x_TD = tokens * ((1 - o.jitter) + 2 * o.jitter * u)
    logits = linear_logits(given)
    given.x_TD = tokens
    factor = o.capacity_factor if given.training else o.eval_capacity_factor
    sequence = given.sequence
    taken: dict[tuple[int, int], int] = {}
    ids, weights = [], []
    for t, row in enumerate(logits):
        p = torch.stack(softmax(row))
        e = int(p.argmax())
        room = math.ceil(factor * sequence.count(sequence[t]) / given.n_experts) if factor else math.inf
        place = taken.get((sequence[t], e), 0)
        taken[sequence[t], e] = place + 1
        ids.append([e] if place < room else [])
        weights.append([p[e]] if place < room else [])
    return Decided(given.mix(ids, weights), ids)
