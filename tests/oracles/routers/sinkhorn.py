import torch

from tests.oracles.routers import Decided, Given, largest, linear_logits

CASES = [{}, {"iterations": 1}, {"iterations": 50}]


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    ids = [largest(row, given.top_k) for row in logits]
    if given.training:
        for sequence in set(given.sequence):
            members = [t for t, s in enumerate(given.sequence) if s == sequence]
            plan = [[torch.exp(z).item() for z in logits[t]] for t in members]
            for _ in range(given.options.iterations):
                for e in range(given.n_experts):
                    column = sum(row[e] for row in plan)
                    for row in plan:
                        row[e] *= len(members) / given.n_experts / column
                for row in plan:
                    row[:] = [value / sum(row) for value in row]
            for t, row in zip(members, plan, strict=True):
                ids[t] = largest(torch.tensor(row, dtype=torch.double), given.top_k)
    weights = [
        [1 / (1 + torch.exp(-row[e])) for e in chosen] for row, chosen in zip(logits, ids, strict=True)
    ]
    return Decided(given.mix(ids, weights), ids)
