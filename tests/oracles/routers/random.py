import torch

from tests.oracles.routers import Decided, Given, top_k_softmax


def route(given: Given) -> Decided:
    if given.training:
        scores = given.spec.uniform("scores", given.context, given.n_experts)
    else:
        seen: dict[int, int] = {}
        places = []
        for sequence in given.sequence:
            places.append(seen.get(sequence, 0))
            seen[sequence] = places[-1] + 1
        scores = given.spec.lasting_uniform("scores", torch.tensor(places), given.n_experts)
    return top_k_softmax(given, list(scores.double()))
