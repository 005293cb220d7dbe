import torch

from tests.oracles.routers import Decided, Given, dot, top_k_softmax

CASES = [{}, {"stats": "batch"}, {"stats": "batch", "min_share": 0.25}, {"min_share": 0.25}]


def route(given: Given) -> Decided:
    clusters = [row[0] for row in given.previous.expert_ids_TK.tolist()]
    if given.training and given.options.stats == "batch":
        shares, deviations = batch_statistics(given, clusters)
    else:
        firsts, seconds = given.state["moments"]
        shares = (firsts[:, 0] / sum(firsts[:, 0])).tolist()
        deviations = [row[1:] / row[0] if row[0] > 0 else None for row in seconds]
    scales = tightness(shares, deviations, given.options.min_share)
    logits = []
    for token, c in zip(given.x_TD, clusters, strict=True):
        scaled = token if scales[c] is None else token * scales[c]
        logits.append(torch.stack([dot(scaled, v) / dot(v, v).sqrt() for v in given.state["weight"]]))
    return top_k_softmax(given, logits)


def batch_statistics(given, clusters):
    shares, deviations = [], []
    x_TD = given.x_TD.detach()
    for e in range(given.n_experts):
        members = [x_TD[t] for t, c in enumerate(clusters) if c == e]
        shares.append(len(members) / given.n_tokens)
        mean = sum(members) / len(members) if members else None
        deviations.append(sum((m - mean).abs() for m in members) / len(members) if members else None)
    return shares, deviations


def tightness(shares, deviations, min_share):
    big = [e for e, s in enumerate(shares) if s >= min_share and deviations[e] is not None]
    raw = {e: 1 / (deviations[e] + 1e-4) for e in big}
    limit = 10 * sum(row.sum().item() for row in raw.values()) / sum(row.numel() for row in raw.values())
    raw = {
        e: torch.tensor([min(v, limit) for v in row.tolist()], dtype=torch.double) for e, row in raw.items()
    }
    mean = sum(raw.values()) / len(raw)
    return [raw[e] / mean if e in raw else None for e in range(len(shares))]
