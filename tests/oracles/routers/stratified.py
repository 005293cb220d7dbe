import torch

from tests.oracles.routers import Decided, Given, dot, largest, softmax

CASES = [{}, {"strata": (2, 2)}, {"strata": (1, 1, 2)}, {"strata": (4,)}]


def route(given: Given) -> Decided:
    strata = given.options.strata or (1, 3)
    stratum = [i for i, size in enumerate(strata) for _ in range(size)]
    xs, gates = list(given.x_TD), [0] * given.n_tokens
    ids: list[list[int]] = [[] for _ in xs]
    losses = []
    for gate in range(len(strata)):
        first = stratum.index(gate)
        visible = list(range(first, given.n_experts))
        here = [t for t in range(given.n_tokens) if gates[t] == gate]
        firsts, total = [], [0.0] * len(visible)
        for t in here:
            inner = layer_norm(xs[t], given.state[f"norms.{gate}.weight"], given.state[f"norms.{gate}.bias"])
            p = softmax([dot(row, inner) for row in given.state[f"gates.{gate}"]])
            chosen = largest(torch.stack(p), min(given.top_k, len(visible)))
            xs[t] = xs[t] + sum(p[v] * given.expert(first + v, inner) for v in chosen)
            ids[t] += [first + v for v in chosen]
            gates[t] = stratum[first + chosen[0]] + 1
            firsts.append(chosen[0])
            total = [a + b for a, b in zip(total, p, strict=True)]
        loss = torch.zeros((), dtype=torch.double)
        for v in range(len(visible)):
            if here:
                loss = loss + len(visible) * firsts.count(v) / len(here) * total[v] / len(here)
        losses.append(loss)
    y_TD = torch.stack(xs) - given.x_TD
    return Decided(y_TD, ids, {"strata": sum(losses) / len(losses)} if given.training else {})


def layer_norm(x, gain, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain + bias
