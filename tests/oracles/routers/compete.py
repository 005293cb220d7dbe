import torch

from tests.oracles.routers import Decided, Given, dot, largest, linear_logits, softmax, top_k_softmax

CASES = [
    {},
    {"rate": 1.0},
    {"rate": 1.0, "temperature": 0.1, "winners_weight": 0.2},
    {"rate": 1.0, "response": "norm"},
    {"rate": 1.0, "warm_up_steps": 4},
]


def route(given: Given) -> Decided:
    """All experts compute for all tokens, with gradient."""
    o, logits = given.options, linear_logits(given)
    always = o.rate == 1 and given.context.step >= o.warm_up_steps
    if not (given.training and always):
        return top_k_softmax(given, logits)
    ys, ids, distill, diversity = [], [], 0, 0
    k = given.top_k
    for token, row in zip(given.x_TD, logits, strict=True):
        outputs = [given.expert(e, token) for e in range(given.n_experts)]
        a = torch.stack([respond(output, o.response) for output in outputs])
        chosen = largest(a, k)
        if o.response == "softplus":
            w = [a[e] / sum(a[i] for i in chosen) for e in chosen]
        else:
            w = softmax([a[e] for e in chosen])
        ys.append(sum(weight * outputs[e] for weight, e in zip(w, chosen, strict=True)))
        ids.append(chosen)
        target = [t.detach() for t in softmax(list(a / o.temperature))]
        errors = [(p - t) ** 2 for p, t in zip(softmax(list(row)), target, strict=True)]
        distill = distill + sum(errors) / len(errors)
        distill = distill + o.winners_weight * sum(errors[e] for e in chosen) / k
        for i in chosen:
            for j in chosen:
                if i != j:
                    norms = (dot(outputs[i], outputs[i]) * dot(outputs[j], outputs[j])).sqrt()
                    diversity = diversity + dot(outputs[i], outputs[j]) / norms / k**2
    n = given.n_tokens
    zero = torch.zeros((), dtype=torch.double)
    return Decided(torch.stack(ys), ids, {"distill": distill / n, "diversity": zero + diversity / n})


def respond(output: torch.Tensor, how: str) -> torch.Tensor:
    if how == "norm":
        return dot(output, output).sqrt()
    return sum(torch.log1p(torch.exp(value)) for value in output) / len(output)
