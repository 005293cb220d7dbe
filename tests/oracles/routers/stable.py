import torch

from tests.oracles.routers import Decided, Given, dot, largest, linear_logits

CASES = [{}, {"stage_steps": 1}]


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    frozen = given.state["frozen"].item() == 1
    choosing = [given.state["table"][i] for i in given.token_ids] if frozen else logits
    ids = [largest(row, given.top_k) for row in choosing]
    weights = [
        [1 / (1 + torch.exp(-row[e])) for e in chosen] for row, chosen in zip(logits, ids, strict=True)
    ]
    y_TD = given.mix(ids, weights)
    if frozen or not given.training:
        return Decided(y_TD, ids)
    distill, load = 0, 0
    for t, token_id in enumerate(given.token_ids):
        embedded = given.state["light_embedding"][token_id]
        light = [dot(row, embedded) for row in given.state["light_weight"]]
        target = int(logits[t].argmax())
        distill = distill + torch.log(sum(torch.exp(value) for value in light)) - light[target]
        for e, w in zip(ids[t], weights[t], strict=True):
            mean = given.n_tokens * given.top_k / given.n_experts
            load = load + (sum(e in row for row in ids) - mean) / mean * w
    return Decided(y_TD, ids, {"distill": distill / given.n_tokens, "load": load / given.n_tokens})
