from tests.oracles.routers import Decided, Given

CASES = [{}]


def route(given: Given) -> Decided:
    ids = [list(range(given.n_experts)) for _ in given.x_TD]
    return Decided(given.mix(ids, [[1.0] * given.n_experts for _ in given.x_TD]), ids)
