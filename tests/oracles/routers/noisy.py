import math

import torch

from tests.oracles.routers import Decided, Given, dot, linear_logits, top_k_softmax


def route(given: Given) -> Decided:
    clean = linear_logits(given)
    if not given.training:
        return top_k_softmax(given, clean)
    noise = given.spec.gaussian("noise", given.context, given.n_experts).double()
    sizes = [
        torch.stack([torch.log1p(torch.exp(dot(row, token))) for row in given.state["noise_weight"]])
        for token in given.x_TD
    ]
    noisy = [c + n * s for c, n, s in zip(clean, noise, sizes, strict=True)]
    decided = top_k_softmax(given, noisy)
    importance = torch.zeros(given.n_experts, dtype=torch.double)
    load = torch.zeros(given.n_experts, dtype=torch.double)
    for h, c, s, ids in zip(noisy, clean, sizes, decided.ids, strict=True):
        powers = [torch.exp(h[e]) for e in ids]
        for e, power in zip(ids, powers, strict=True):
            importance = importance + one_hot(e, given.n_experts) * power / sum(powers)
        for e in range(given.n_experts):
            others = sorted((h[i] for i in range(given.n_experts) if i != e), key=lambda v: -v.item())
            if given.top_k < given.n_experts:
                z = (c[e] - others[given.top_k - 1]) / s[e]
                load = load + one_hot(e, given.n_experts) * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    losses = {"importance": cv_squared(importance)}
    if given.top_k < given.n_experts:
        losses["load"] = cv_squared(load)
    return Decided(decided.y_TD, decided.ids, losses)


def one_hot(e: int, n: int) -> torch.Tensor:
    return torch.tensor([float(i == e) for i in range(n)], dtype=torch.double)


def cv_squared(values: torch.Tensor) -> torch.Tensor:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2
