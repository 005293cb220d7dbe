from tests.oracles.routers import Decided, Given, linear_logits

CASES = [{}, {"lambda_start": 0.5}]


def route(given: Given) -> Decided:
    logits = linear_logits(given)
    ids = [[e for e, z in enumerate(row.tolist()) if z > 0] for row in logits]
    y_TD = given.mix(ids, [[row[e] for e in chosen] for row, chosen in zip(logits, ids, strict=True)])
    if not given.training:
        return Decided(y_TD, ids)
    loss = 0
    for e in range(given.n_experts):
        takers = [row[e] for row, chosen in zip(logits, ids, strict=True) if e in chosen]
        loss = loss + len(takers) / given.n_tokens * sum(takers) / given.n_tokens
    return Decided(y_TD, ids, {"sparsity": given.state["lambda_"][0] * given.n_experts / given.top_k * loss})
