import torch

from tests.oracles.routers import Decided, Given, largest, linear_logits, softmax

CASES = [{}, {"drop": 0.6}, {"drop": 0.0}]


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    kept = [[True] * given.n_experts for _ in logits]
    if given.training:
        draws = given.spec.uniform("dropout", given.context, given.n_experts)
        kept = [[u >= given.options.drop for u in row] for row in draws.tolist()]
    ids, weights = [], []
    for row, keep in zip(logits, kept, strict=True):
        s = 1 / (1 + torch.exp(-row))
        order = [e for e in largest(s, given.n_experts) if keep[e]][: given.top_k]
        ids.append(order)
        weights.append([s[e] for e in order])
    if not given.training:
        return Decided(given.mix(ids, weights), ids)
    p = [sum(column) / given.n_tokens for column in zip(*map(softmax, logits), strict=True)]
    return Decided(given.mix(ids, weights), ids, {"entropy": sum(v * torch.log(v) for v in p)})
