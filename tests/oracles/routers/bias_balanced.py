import torch

from tests.oracles.routers import Decided, Given, largest, linear_logits

CASES = [{}, {"rate": 0.5}]


def route(given: Given) -> Decided:
    ids, weights = [], []
    for row in linear_logits(given):
        s = 1 / (1 + torch.exp(-row))
        chosen = largest(s + given.state["selection_bias"], given.top_k)
        ids.append(chosen)
        weights.append([s[e] / sum(s[i] for i in chosen) for e in chosen])
    return Decided(given.mix(ids, weights), ids)
