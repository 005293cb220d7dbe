import torch

from tests.oracles.routers import Decided, Given, dot, top_k_softmax

CASES = [{}, {"width": 3, "temperature": 0.2}]


def route(given: Given) -> Decided:
    tau = given.state["temperature"][0]
    tau = tau if tau.item() > 0.01 else torch.tensor(0.01)
    logits = []
    for token in given.x_TD:
        u = torch.stack([dot(row, token) for row in given.state["projection"]])
        logits.append(
            torch.stack([dot(u, v) / (dot(u, u) * dot(v, v)).sqrt() / tau for v in given.state["centroids"]])
        )
    return top_k_softmax(given, logits)
