import math

from tests.oracles.routers import Decided, Given, linear_logits, softmax

CASES = [{}, {"capacity": 0.7}, {"capacity": 9}]


def route(given: Given) -> Decided:
    ps = [softmax(row) for row in linear_logits(given)]
    ids: list[list[int]] = [[] for _ in ps]
    for sequence in set(given.sequence):
        members = [t for t, s in enumerate(given.sequence) if s == sequence]
        room = math.ceil(given.options.capacity * len(members) / given.n_experts)
        for e in range(given.n_experts):
            for t in sorted(members, key=lambda t: -ps[t][e].item())[:room]:
                ids[t].append(e)
    return Decided(given.mix(ids, [[p[e] for e in row] for p, row in zip(ps, ids, strict=True)]), ids)
