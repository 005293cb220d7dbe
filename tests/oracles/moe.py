"""The mixture layer as its equations read: loops over tokens and choices, in float64."""

import math

import torch


def mixture(
    x_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
) -> torch.Tensor:
    """y_t = sum over choices j of w_tj (W_out relu(W_in x_t + b_in) + b_out) of expert e_tj."""
    rows = []
    for token, ids, weights in zip(x_TD, expert_ids_TK.tolist(), weights_TK, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                hidden = torch.clamp(w_in[expert] @ token + b_in[expert], min=0)
                total = total + weight * (w_out[expert] @ hidden + b_out[expert])
        rows.append(total)
    return torch.stack(rows)


def generated_router(
    embedding: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    n_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [E, D] and bias [E] of a HyperRouter: output i * (D + 1) + j is weight (i, j), j = D bias i."""
    d_model = len(embedding)
    output = w2 @ torch.clamp(w1 @ embedding + b1, min=0) + b2
    rows = [output[i * (d_model + 1) : (i + 1) * (d_model + 1)] for i in range(n_experts)]
    return torch.stack([row[:d_model] for row in rows]), torch.stack([row[d_model] for row in rows])


def choose(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights [T, K]: the k largest logits, largest first, and the softmax over them."""
    ids, weights = [], []
    for token in x_TD:
        logits = [torch.dot(row, token) + bias for row, bias in zip(weight_ED, bias_E, strict=True)]
        best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
        powers = [torch.exp(logits[e] - logits[best[0]].detach()) for e in best]
        ids.append(best)
        weights.append(torch.stack(powers) / sum(powers))
    return torch.tensor(ids), torch.stack(weights)


def balance_loss(probabilities: list[list[float]], ids: list[list[int]]) -> float:
    """E * sum_e f_e P_e."""
    n_experts, n_tokens = len(probabilities[0]), len(probabilities)
    chosen = [e for row in ids for e in row]
    return n_experts * math.fsum(
        chosen.count(e) / len(chosen) * math.fsum(row[e] for row in probabilities) / n_tokens
        for e in range(n_experts)
    )
