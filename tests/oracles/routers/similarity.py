import torch

from tests.oracles.routers import Decided, Given, linear_logits, top_k_softmax

CASES = [
    {},
    {"frequency": 0.1, "threshold": -1.0},
    {"frequency": 0.1, "threshold": 0.2, "width": 3},
    {"frequency": 0.1, "threshold": -1.0, "kernel": "rbf", "sigma": 0.5},
]


def route(given: Given) -> Decided:
    decided = top_k_softmax(given, linear_logits(given))
    table, o = given.state["table"], given.options
    pairs = [(i, j) for i in range(given.n_experts) for j in range(i + 1, given.n_experts)]
    due = [pair for pair in pairs if table[pair].item() > o.frequency]
    if not (given.training and due):
        return decided
    total = torch.zeros((), dtype=torch.double)
    for i, j in due:
        tokens = [given.x_TD[t].detach() for t, ids in enumerate(decided.ids) if i in ids and j in ids]
        if len(tokens) >= 8:
            features = [[given.state["projection"] @ given.expert(e, x) for x in tokens] for e in (i, j)]
            value = cka(*(kernel_of(rows, o) for rows in features))
            total = total + (value if value.item() > o.threshold else 0)
    return Decided(decided.y_TD, decided.ids, {"similarity": total})


def kernel_of(rows, o):
    n = len(rows)
    squares = [[((rows[a] - rows[b]) ** 2).sum() for b in range(n)] for a in range(n)]
    others = sorted(squares[a][b].item() for a in range(n) for b in range(n) if a != b)
    width = o.sigma * others[(len(others) - 1) // 2] ** 0.5

    def value(a: int, b: int) -> torch.Tensor:
        if o.kernel == "linear":
            return (rows[a] * rows[b]).sum()
        return torch.exp(-squares[a][b] / (2 * width**2))

    return [[value(a, b) for b in range(n)] for a in range(n)]


def cka(k, m):
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def hsic(k, m):
    """The U-statistic: the mean over quadruples of different tokens, by its expansion in sums over pairs."""
    n = len(k)
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    same = sum(k[a][b] * m[a][b] for a, b in pairs) / (n * (n - 1))
    shared = sum(
        k[a][b] * m[a][c] for a in range(n) for b in range(n) for c in range(n) if len({a, b, c}) == 3
    ) / (n * (n - 1) * (n - 2))
    sum_k, sum_m = sum(k[a][b] for a, b in pairs), sum(m[a][b] for a, b in pairs)
    touching = 4 * shared * n * (n - 1) * (n - 2) + 2 * same * n * (n - 1)
    apart = (sum_k * sum_m - touching) / (n * (n - 1) * (n - 2) * (n - 3))
    return same + apart - 2 * shared
