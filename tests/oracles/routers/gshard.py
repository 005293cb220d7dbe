import math

import torch

from tests.oracles.routers import Decided, Given, largest, linear_logits, softmax

CASES = [{}, {"capacity_factor": 0.5}, {"capacity_factor": 0}]


def route(given: Given) -> Decided:
    ps = [softmax(row) for row in linear_logits(given)]
    ids = [largest(torch.stack(p), 2) for p in ps]
    weights = [[p[a] / (p[a] + p[b]), p[b] / (p[a] + p[b])] for p, (a, b) in zip(ps, ids, strict=True)]
    if not given.training:
        return Decided(given.mix(ids, weights), ids)
    loss = 0
    for e in range(given.n_experts):
        first = sum(row[0] == e for row in ids) / given.n_tokens
        loss = loss + given.n_experts * first * sum(p[e] for p in ps) / given.n_tokens
    chance = given.spec.uniform("second choice", given.context, 1)[:, 0].tolist()
    taken: dict[tuple[int, int], int] = {}
    for choice in (0, 1):
        for t, sequence in enumerate(given.sequence):
            if choice == 1 and chance[t] >= 2 * weights[t][1].item():
                ids[t][1] = -1
                continue
            line = sequence, ids[t][choice]
            taken[line] = taken.get(line, 0) + 1
            length = given.sequence.count(sequence)
            factor = given.options.capacity_factor
            if factor and taken[line] > math.ceil(2 * factor * length / given.n_experts):
                ids[t][choice] = -1
    return Decided(given.mix(ids, weights), ids, {"first_choice": loss})
