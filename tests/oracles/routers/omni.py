from tests.oracles.routers import Decided, Given, largest, linear_logits, softmax

CASES = [{}, {"noise": 0.5}]


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    if given.training and given.options.noise:
        noise = given.spec.gaussian("noise", given.context, given.n_experts).double()
        logits = [row + given.options.noise * n for row, n in zip(logits, noise, strict=True)]
    ids = [largest(row, given.top_k) for row in logits]
    weights = [[softmax(row)[e] for e in chosen] for row, chosen in zip(logits, ids, strict=True)]
    return Decided(given.mix(ids, weights), ids)
