"""What a rank sends to whom, rank by rank and token by token."""


def sent(ids: list[list[int]], n_local: int, n_ranks: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """For each rank the tokens that travel to it, and the choices: place in [T, K] and code."""
    parcels = []
    for rank in range(n_ranks):
        there = range(rank * n_local, (rank + 1) * n_local)
        tokens = [token for token, chosen in enumerate(ids) if any(expert in there for expert in chosen)]
        choices = [
            (token * len(chosen) + k, tokens.index(token) * n_local + expert - there.start)
            for token, chosen in enumerate(ids)
            for k, expert in enumerate(chosen)
            if expert in there
        ]
        parcels.append((tokens, choices))
    return parcels
