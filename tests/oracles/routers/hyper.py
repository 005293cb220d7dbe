import torch

from tests.oracles.moe import generated_router
from tests.oracles.routers import Decided, Given, dot, top_k_softmax

CASES = [{}, {"hyper_size": 5}, {"learned": True, "hyper_size": 5}, {"start_std": 0.3, "shared": True}]


def route(given: Given) -> Decided:
    names = ("embedding", "hypernet_w_in", "hypernet_b_in", "hypernet_w_out", "hypernet_b_out")
    weight_ED, bias_E = generated_router(*(given.state[name] for name in names), given.n_experts)
    logits = [
        torch.stack([dot(row, token) + bias for row, bias in zip(weight_ED, bias_E, strict=True)])
        for token in given.x_TD
    ]
    return top_k_softmax(given, logits)
