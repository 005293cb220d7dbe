from tests.oracles.routers import Decided, Given, linear_logits, top_k_softmax

CASES = [{}, {"drop": 0.1}, {"drop": 0.0}]


def route(given: Given) -> Decided:
    logits, drop = linear_logits(given), given.options.drop
    if given.training and drop > 0:
        draws = given.spec.uniform("dropout", given.context, given.n_experts).tolist()
        for t, row in enumerate(draws):
            for e, u in enumerate(row):
                logits[t][e] = logits[t][e] / (1 - drop) if u >= drop else 0 * logits[t][e]
    return top_k_softmax(given, logits)
