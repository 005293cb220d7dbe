import torch

from tests.oracles.routers import Decided, Given, largest


def route(given: Given) -> Decided:
    if given.training:
        draws = given.spec.generator("draw", given.context.step)
        drawn = torch.randint(given.n_experts, (2,), generator=draws).tolist()
        routes = [0] * given.n_tokens if given.context.route_T is None else given.context.route_T.tolist()
        ids = [[drawn[r]] for r in routes]
    else:
        places = [given.sequence[:t].count(sequence) for t, sequence in enumerate(given.sequence)]
        scores = given.spec.lasting_uniform("draw", torch.tensor(places), given.n_experts)
        ids = [largest(row, 1) for row in scores]
    return Decided(given.mix(ids, [[1.0] for _ in ids]), ids)
