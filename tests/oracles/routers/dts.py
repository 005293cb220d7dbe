from tests.oracles.routers import Decided, Given, largest, linear_logits, softmax

CASES = [{}, {"tau_steps": 4, "threshold": 0.2}, {"tau_start": 0.5, "tau_end": 0.1, "tau_steps": 2}]


def route(given: Given) -> Decided:
    logits, o = linear_logits(given), given.options
    if not given.training:
        ps = [softmax(row) for row in logits]
        ids = [largest(row, given.top_k) for row in logits]
        return Decided(given.mix(ids, [[p[e] for e in row] for p, row in zip(ps, ids, strict=True)]), ids)
    tau = o.tau_start + min(given.context.step / o.tau_steps, 1) * (o.tau_end - o.tau_start)
    noise = given.spec.gumbel("noise", given.context, given.n_experts)
    ids, weights = [], []
    for row, n in zip(logits, noise, strict=True):
        scores = (row + n.double()) / tau
        p = softmax(scores)
        best = largest(scores, given.top_k)
        chosen = [e for e in range(given.n_experts) if e in best or p[e].item() > o.threshold]
        ids.append(chosen)
        weights.append([p[e] for e in chosen])
    return Decided(given.mix(ids, weights), ids)
